"""The stages in order, resumed, and with what other settings left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet import training
from codedinvnet.common.errors import UserError
from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import VALIDATION, load_bundle
from codedinvnet.models.checkpoint import load_checkpoint
from codedinvnet.nn.lipschitz import constrained_layers
from codedinvnet.training.loop import LATEST, train_stage
from codedinvnet.training.network import NetworkStage, load_trained_network
from codedinvnet.training.recovery import RecoveryStage
from tests.conftest import digests, make_run, tiny_settings
from tests.training.runs import CPU, shared_network


def test_all_stages_of_the_papers_objective(pixels: stages.Run) -> None:
    report = stages.test_fusion(pixels, 2)
    written = json.loads((pixels.fusion_folder(2) / "evaluation.json").read_text())
    assert written == report
    assert (report["split"], report["k"], report["images"]) == ("test", 2, 200)
    assert 0.3 < report["normal_accuracy"] <= 1  # chance is 0.1
    bundle = load_bundle(pixels.fusion_folder(2) / "bundle")
    assert bundle.info.group_sizes == (2,)
    assert constrained_layers(bundle.model) == []  # folded
    model, _ = load_trained_network(pixels.settings, pixels.network_folder, CPU)
    images = pixels.images("test").batch(torch.arange(50))[0]
    with torch.no_grad():
        expected = model.classify(model.embed(images)).softmax(1)
    torch.testing.assert_close(bundle.classify(bundle.embed(images)), expected, rtol=0, atol=1e-5)


def test_resumed_fusion_equals_an_unbroken_one(
    recovery_run: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recovery_run.data_dir is not None
    raw = tiny_settings("recovery")
    run = make_run(raw, tmp_path, recovery_run.data_dir)
    run.folder.mkdir(parents=True)
    run.network_folder.symlink_to(recovery_run.network_folder)
    real = RecoveryStage.start_epoch
    for phase, broken in (("recovery", 1), ("joint", 0), ("joint", 1)):

        def breaks(
            self: RecoveryStage,
            epoch: int,
            generator: torch.Generator,
            phase: str = phase,
            broken: int = broken,
        ) -> None:
            if (self.name, epoch) == (phase, broken):
                raise KeyboardInterrupt
            real(self, epoch, generator)

        monkeypatch.setattr(RecoveryStage, "start_epoch", breaks)
        with pytest.raises(KeyboardInterrupt):
            stages.fuse(make_run(raw, tmp_path, recovery_run.data_dir, resume=-1), 4)
        assert not (run.fusion_folder(4) / "bundle").exists()
    monkeypatch.setattr(RecoveryStage, "start_epoch", real)
    stages.fuse(make_run(raw, tmp_path, recovery_run.data_dir, resume=-1), 4)
    expected, _ = load_checkpoint(recovery_run.fusion_folder(4) / "bundle" / "weights.safetensors")
    found, _ = load_checkpoint(run.fusion_folder(4) / "bundle" / "weights.safetensors")
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def network_weights(path: Path) -> str | None:
    """Return the digest of the network that a header states, or that it depends on."""
    _, header = load_checkpoint(path)
    found: str | None = {**header["settings"], **header}.get("network_weights")
    return found


def rewritten(data_dir: Path, root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an image folder, and change what both of its files hold."""
    shutil.copytree(data_dir, root)
    for path in (root / "mnist").glob("*.npz"):
        with np.load(path) as found:
            arrays = dict(found)
        change(arrays)
        np.savez(path, **arrays)
    return root


def in_another_order(arrays: dict[str, Any]) -> None:
    arrays["images"], arrays["labels"] = arrays["images"][::-1], arrays["labels"][::-1]


def test_no_stage_goes_on_with_images_in_another_order(pixels: stages.Run, tmp_path: Path) -> None:
    assert pixels.data_dir is not None
    other = rewritten(pixels.data_dir, tmp_path / "data", in_another_order)
    run = replace(shared_network(pixels, tmp_path), data_dir=other)
    told = "has other training images than the network was trained on, or has them in another order"
    for stage in (stages.sample, stages.fuse):
        with pytest.raises(UserError, match=told):
            stage(run, 2)
    with pytest.raises(UserError, match=told):
        stages.train(replace(run, resume=LATEST))
    bundle = load_bundle(shutil.copytree(pixels.fusion_folder(2) / "bundle", tmp_path / "bundle"))
    assert bundle.info.provenance.images == pixels.images("train").digest()
    for split, count in (("train", 700), ("validation", 100)):
        places = (pixels.data_dir, other)
        found = [stages.evaluation_images(bundle, split, place) for place in places]
        there, here = (sorted(source.image_digests().tolist()) for source in found)
        assert here == there
        assert len(set(here)) == count
    (bundle.folder / VALIDATION).unlink()
    with pytest.raises(UserError, match="no checkpoint at"):
        stages.evaluation_images(bundle, "validation", other)
    stages.evaluation_images(bundle, "test", other)  # of the test split the order does not matter


def train_otherwise(run: stages.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a run's network anew with the same settings but, as elsewhere, other roundings."""

    def otherwise(stage: NetworkStage, folder: Path, *, seed: int, **options: Any) -> Any:
        return train_stage(stage, folder, seed=seed + 1, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training.network, "train_stage", otherwise)
        stages.train(replace(run, resume=0))


def test_no_encoder_goes_on_with_another_network(
    recovery_run: stages.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recovery_run.save_dir, tmp_path, dirs_exist_ok=True)
    run = replace(recovery_run, save_dir=tmp_path, resume=LATEST)
    last = run.fusion_folder(4) / "joint" / "last.safetensors"
    assert network_weights(last) == network_weights(run.network_folder / "network.safetensors")
    train_otherwise(run, monkeypatch)
    with pytest.raises(UserError, match="joint was trained for another network than"):
        stages.test_fusion(run, 4)
    with pytest.raises(UserError, match=r"recovery/last.* \(network_weights .*: start over"):
        stages.fuse(run, 4)


def test_a_network_of_other_settings_is_refused(recovery_run: stages.Run) -> None:
    # Another seed splits the images otherwise: validation images would have been trained on.
    assert recovery_run.data_dir is not None
    before = digests(recovery_run.save_dir)
    raw = tiny_settings("recovery")
    raw["seed"] = 4
    run = make_run(raw, recovery_run.save_dir, recovery_run.data_dir)
    with pytest.raises(UserError, match="seed 3 -> 4"):
        stages.fuse(run, 4)
    assert digests(recovery_run.save_dir) == before


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def own(pixels: stages.Run, tmp_path: Path) -> stages.Run:
    """A finished run in a folder of its own."""
    shutil.copytree(pixels.save_dir, tmp_path / "runs")
    return replace(pixels, save_dir=tmp_path / "runs")


def test_a_network_that_starts_over_leaves_none_to_go_on_with(
    own: stages.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.network, "train_stage", interrupted)
    before = digests(own.network_folder)
    with pytest.raises(KeyboardInterrupt):
        stages.train(replace(own, resume=LATEST))
    assert digests(own.network_folder) == before
    with pytest.raises(KeyboardInterrupt):
        stages.train(own)
    with pytest.raises(UserError, match="no trained network at"):
        stages.fuse(own, 2)
    kept = own.network_folder / "checkpoints-before-1"
    assert sorted(p.name for p in kept.iterdir()) == sorted(
        f"{name}.safetensors" for name in ("best", "last", "network")
    )
