"""What the trainings learn: encoders, precision, steps and batch statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from codedinvnet.codes.build import scheme_for
from codedinvnet.common.config import parse_settings
from codedinvnet.common.errors import UserError
from codedinvnet.evaluation import stages
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.models.bundle import load_bundle
from tests.conftest import make_run, tiny_settings, write_images


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_irevnet_run(
    precision: str, data_dir: Path, tmp_path: Path, bfloat16_instructions: None
) -> None:
    raw = tiny_settings("recovery", "irevnet")
    raw["training"]["precision"] = precision
    run = make_run(raw, tmp_path, data_dir)
    stages.train(run)
    stages.fuse(run, 4)
    report = stages.test_fusion(run, 4)
    assert report["normal_accuracy"] > 0.3  # chance is 0.1
    inversion = stages.test_inversion(run)
    assert inversion["largest_error"] < 1e-4
    assert "largest_singular_value" not in inversion


def test_a_plain_network_is_trained_and_decoded_without_an_inverse(
    data_dir: Path, tmp_path: Path
) -> None:
    run = make_run(tiny_settings("recovery", "plain"), tmp_path, data_dir)
    stages.train(run)
    stages.fuse(run, 4)
    report = stages.test_fusion(run, 4)
    assert report["normal_accuracy"] > 0.3  # chance is 0.1
    bundle = load_bundle(run.fusion_folder(4) / "bundle")
    images = run.images("test").batch(torch.arange(4))[0]
    latents = bundle.embed(images)
    parity = bundle.encode(images[None])
    assert bundle.decode(parity, latents[None, 1:]).shape == (1, 10)
    exact = bundle.decode(latents.mean(0, keepdim=True), latents[None, 1:])
    torch.testing.assert_close(exact, bundle.classify(latents[:1]), rtol=0, atol=1e-4)
    needs_inverse: list[Callable[[], object]] = [
        lambda: bundle.invert(latents),
        lambda: stages.test_inversion(run),
        lambda: scheme_for(bundle, 4, "oracle"),
        lambda: scheme_for(bundle, 4, "coded-invnet-paper", tmp_path),
        lambda: parse_settings(tiny_settings("pixels", "plain"), "tiny"),
    ]
    for refused in needs_inverse:
        with pytest.raises(UserError, match="the network has no inverse"):
            refused()


@pytest.mark.nightly
def test_training_on_the_shipped_images_beats_chance_by_far(tmp_path: Path) -> None:
    """800 images to train on, 100 to choose the epoch, 100 held out (of 10 classes)."""
    data = write_images(tmp_path / "data", train=900, test=100)
    raw = tiny_settings("recovery")
    raw["network"].update(blocks=[1, 1, 1], strides=[1, 2, 2], hidden=[16, 32, 32])
    raw["training"].update(epochs=10)
    raw["fusion"].update(
        batch_size=32,
        steps_per_epoch=30,
        epochs=2,
        joint_batch_size=16,
        joint_epochs=2,
        encoder={"kind": "lean", "width": 8},
    )
    run = make_run(raw, tmp_path / "runs", data)
    stages.train(run)
    stages.fuse(run, 4)
    bundle = load_bundle(run.fusion_folder(4) / "bundle")
    for k in (2, 4):
        report = evaluation_report(bundle, run.images("test"), split="test", k=k)
        shuffled = evaluation_report(
            bundle, run.images("test"), split="test", k=k, shuffle_parity=True
        )
        assert report["images"] == 100
        assert report["normal_accuracy"] > 0.7
        assert report["recovered_accuracy"] > 0.65
        assert report["worst_position_accuracy"] > 0.55
        assert report["agreement"] > 0.6
        assert shuffled["normal_accuracy"] == report["normal_accuracy"]
        assert shuffled["recovered_accuracy"] < 0.3
