from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from codedinvnet.common.config import load_settings
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSet
from codedinvnet.models import bundle as bundle_module
from codedinvnet.models.bundle import (
    DESCRIPTION,
    WEIGHTS,
    Bundle,
    load_bundle,
    save_bundle,
    shipped_bundles,
)
from codedinvnet.models.coded import build_model, decode_missing


@pytest.fixture
def copied(bundle_folder: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "copied"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_bundle(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_bundles())
def test_a_shipped_bundle_is_what_its_settings_file_trains(name: str) -> None:
    loaded = load_bundle(name)
    made, kept = loaded.info.provenance, loaded.validation_digests()
    path = Path(__file__).parents[2] / "configs" / "alone" / f"{name}.json"
    assert load_settings(path) == made.settings
    assert loaded.info.group_sizes[0] == 2
    assert len(kept) == made.settings.data.validation


def test_round_trip_keeps_every_answer(bundle: Bundle, held_out: ImageSet, tmp_path: Path) -> None:
    settings = bundle.info.model
    torch.manual_seed(5)
    model = build_model(settings)  # constrained layers: save_bundle folds them
    images = held_out.images[:8]
    model.eval()
    with torch.no_grad():
        z = model.embed(images)
        groups = images.unflatten(0, (2, 4))
        parity = model.encode(groups)
        lost = decode_missing(parity, z.unflatten(0, (2, 4))[:, 1:])
        expected = [model.classify(z).softmax(1), parity, model.classify(lost).softmax(1)]
    save_bundle(tmp_path / "saved", bundle.info, model, bundle.validation_digests())
    loaded = load_bundle(tmp_path / "saved")
    assert loaded.info == bundle.info
    latents, sent = loaded.embed(images), loaded.encode(groups)
    others = latents.unflatten(0, (2, 4))[:, 1:]
    found = [loaded.classify(latents), sent, loaded.decode(sent, others)]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_digests_of_the_images_set_aside_are_kept(copied: Path) -> None:
    bundle = load_bundle(copied)
    kept = bundle.validation_digests()
    assert (len(kept), kept.dtype) == (100, torch.int64)
    save_bundle(copied, bundle.info, bundle.model, kept.flip(0))
    assert torch.equal(load_bundle(copied).validation_digests(), kept)


def test_a_kill_while_a_bundle_is_replaced_leaves_none(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(copied)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("codedinvnet.models.bundle.write_description", killed)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(copied, bundle.info, bundle.model, bundle.validation_digests())
    assert "no bundle" in refusal(copied)


def images_with(value: float) -> torch.Tensor:
    images = torch.full((2, 1, 28, 28), 0.5)
    images[1, 0, 3, 4] = value
    return images


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 28, 28, dtype=torch.uint8),
        torch.zeros(1, 2, 1, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 1, 28, 28, dtype=torch.int64),
        images_with(float("nan")),
        images_with(1.01),
        images_with(-0.01),
    ],
)
def test_wrong_images_and_latents_are_refused(images: torch.Tensor, bundle: Bundle) -> None:
    with pytest.raises(UserError, match="images must"):
        bundle.embed(images)
    if images.ndim == 4:
        with pytest.raises(UserError, match="images must"):
            bundle.encode(images[None])
    for method in (bundle.classify, bundle.invert):
        with pytest.raises(UserError, match="latents must have shape"):
            method(images)


def test_shipped_bundles_are_found_by_name(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the distribution of their own, if this is no clone."""
    package = tmp_path / "codedinvnet_bundles"
    shutil.copytree(bundle_folder, package / "beta")
    shutil.copytree(bundle_folder, package / "alpha")
    (package / "empty").mkdir()
    monkeypatch.setattr(bundle_module, "BESIDE", tmp_path / "away")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert bundle_module.shipped_bundles() == ("alpha", "beta")
    assert load_bundle("beta").info.classes == tuple("0123456789")
    with pytest.raises(UserError, match=r"no bundle 'gamma'.*alpha, beta"):
        load_bundle("gamma")


def test_what_is_damaged_is_refused(copied: Path) -> None:
    description, weights = (copied / DESCRIPTION).read_bytes(), (copied / WEIGHTS).read_bytes()
    raw = json.loads(description)
    raw["model"]["network"].update(hidden=[8, 12])
    for name, content, said in (
        (DESCRIPTION, b"", "is not JSON"),
        (DESCRIPTION, b'{"format_version": 2}', "missing key"),
        (DESCRIPTION, b'{"format_version": 1}', "train the bundle again"),
        (DESCRIPTION, json.dumps(raw).encode(), "holds another architecture"),
        (WEIGHTS, weights[: len(weights) // 2], "weights"),
        (WEIGHTS, None, "no checkpoint"),
    ):
        (copied / DESCRIPTION).write_bytes(description)
        (copied / WEIGHTS).write_bytes(weights)
        (copied / name).unlink() if content is None else (copied / name).write_bytes(content)
        assert said in refusal(copied)
