"""What is in use when a training starts over, is refused, or is done once more."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import WEIGHTS, bundle_info, load_bundle
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.training import network
from codedinvnet.training.loop import LATEST
from tests.conftest import digests


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
    monkeypatch.setattr(network, "train_stage", interrupted)
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


def test_test_figures_stay_as_long_as_the_weights_do(own: stages.Run) -> None:
    run = replace(own, resume=LATEST)
    path = Path(stages.reproduce(run, 2)["bundle"])
    before = bundle_info(path).figures
    assert before.keys() == {"validation", "test_k2"}
    stages.fuse(run, 2)
    assert bundle_info(path).figures == before
    weights = path / WEIGHTS
    tensors, header = load_checkpoint(weights)
    save_checkpoint(weights, {key: tensor + 1 for key, tensor in tensors.items()}, header)
    stages.fuse(run, 2)  # of what the weights were, nobody knows
    assert bundle_info(path).figures.keys() == {"validation"}
    weights.unlink()
    stages.fuse(run, 2)
    assert load_bundle(path).info.figures.keys() == {"validation"}
