from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codedinvnet.bench.grid import DataSetSettings
from codedinvnet.bench.parts import DataSet, _set_aside
from codedinvnet.checkpoint import save_checkpoint
from codedinvnet.codes.method import given_by
from codedinvnet.codes.registry import find_method
from codedinvnet.config import PartSettings, PixelFusionSettings
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.training.pixels import VERSION, fusion_targets


def test_what_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training of other settings; an option that it is too old to have is no other setting."""
    folder = tmp_path / "seed1"
    folder.mkdir()
    part = PartSettings(epochs=3).model_dump(mode="json")
    settings = {"part": part, "seed": 1, "images": 50}
    old = {**settings, "part": {k: v for k, v in part.items() if k != "weight_decay"}}
    save_checkpoint(folder / "last.safetensors", {}, {"settings": old})
    _set_aside(folder, settings)
    assert folder.is_dir()
    for number, images in enumerate((51, 52), start=1):
        _set_aside(folder, {**settings, "images": images})
        assert not folder.exists()
        assert f"images 50 -> {images}; the old one is seed1-before-{number}" in (
            capsys.readouterr().err
        )
        folder.mkdir()
        save_checkpoint(folder / "last.safetensors", {}, {"settings": settings})


@pytest.mark.parametrize("key", ["training", "paper_training"])
def test_the_papers_encoder_outlives_new_options(tmp_path: Path, key: str) -> None:
    """Its training of before the key of its version was renamed is taken as well."""
    folder = tmp_path / "seed1"
    folder.mkdir()
    method = find_method("coded-invnet-paper")
    paper = PixelFusionSettings(objective="pixels", groups=40, epochs=2)
    made_with = method.made_with(given_by(load_bundle("mnist"), 2), paper)
    settings = {"part": paper.model_dump(mode="json"), **method.versions(), **made_with}
    old = {
        "part": {k: v for k, v in settings["part"].items() if k != "discriminator_layers"},
        "encoder": {k: v for k, v in settings["encoder"].items() if k != "cell_width"},
    }
    for version, kept in ((VERSION, True), (VERSION - 1, False)):
        stored = {"settings": {**old, key: version}}
        save_checkpoint(folder / "last.safetensors", {}, stored)
        _set_aside(folder, settings)
        assert folder.exists() == kept


def test_the_papers_targets_have_the_mean_latent(bundle: Bundle, held_out: ImageSet) -> None:
    groups = torch.arange(12).view(3, 4)
    data = fusion_targets(bundle.model, held_out, groups)
    assert torch.equal(data.groups, groups)
    assert data.targets.shape == (3, *bundle.model.input_shape)
    mean = bundle.embed(held_out.images[:12]).unflatten(0, (3, 4)).mean(dim=1)
    torch.testing.assert_close(bundle.model.network(data.targets), mean, atol=1e-3, rtol=0)


def test_the_majority_is_the_most_frequent_class(tmp_path: Path) -> None:
    images = sample_images("mnist")
    labels = torch.tensor([3] * 40 + [5] * 30 + [0] * 30).repeat(60)
    train = replace(images, images=images.images.repeat(6, 1, 1, 1), labels=labels)
    part = PartSettings(epochs=1)
    settings = DataSetSettings(bundle="mnist", classifier=part, backup=part, parity=part)
    for given, majority in ((train, 3), (None, 0)):
        data = DataSet("mnist", settings, given, images, tmp_path, torch.device("cpu"))
        assert data.majority() == majority
