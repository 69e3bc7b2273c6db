from __future__ import annotations

import re
from pathlib import Path

import torch

import codedinvnet
from codedinvnet.data import sample_images
from codedinvnet.models import bundle

ROOT = Path(__file__).parents[1]


def test_public_names_are_listed_and_load() -> None:
    assert set(codedinvnet.__all__) <= set(dir(codedinvnet))
    for name in codedinvnet.__all__:
        assert getattr(codedinvnet, name).__name__ == name
    assert codedinvnet.load_bundle is bundle.load_bundle


def test_the_first_example_runs_as_it_is_documented() -> None:
    bundle = codedinvnet.load_bundle("mnist")
    assert repr(bundle).startswith("Bundle('mnist': 10 classes, images 1x28x28, latents ")
    samples = sample_images("mnist")
    assert repr(samples) == "ImageSet('mnist': 1000 images 1x28x28 of 10 classes)"
    images = samples.batch(torch.arange(4))[0]
    latents = bundle.embed(images)
    parity = bundle.encode(images[None])
    lost = bundle.decode(parity, latents[None, 1:])
    assert int(lost.argmax()) == int(samples.labels[0])
    again = bundle.invert(latents)
    assert not again.requires_grad
    assert torch.allclose(again, images / 255, atol=1e-2)


def test_what_has_changed_since_a_release_does_not_go_by_its_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changes = (ROOT / "CHANGELOG.md").read_text().split("\n## [")[1:]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert cited is not None
    names, texts = zip(*(change.split("]", 1) for change in changes), strict=True)
    assert names[:2] == ("Unreleased", cited[1])
    assert version[1].endswith(".dev0") == ("\n- " in texts[0])
    assert version[1].endswith(".dev0") != (version[1] == cited[1])


def test_the_extra_takes_the_bundles_of_this_repository() -> None:
    extra = re.search(
        r'"codedinvnet-bundles>=(\d+\.\d+),<(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    own = re.search(
        r'^version = "(\d+)\.(\d+)\.', (ROOT / "bundles/pyproject.toml").read_text(), re.M
    )
    assert extra is not None
    assert own is not None
    assert extra.groups() == (f"{own[1]}.{own[2]}", f"{own[1]}.{int(own[2]) + 1}")
