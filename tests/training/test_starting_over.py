"""What is in use when a training starts over, is refused, or is done once more."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.evaluation import stages
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
