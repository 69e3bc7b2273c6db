"""The benchmark of protected models: one is made in short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import protected
from codedinvnet.protection import distil
from tests.models.factories import save_onnx
from tests.protection.factories import FEATURES, vectors

pytestmark = pytest.mark.nightly


def test_a_model_is_protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 60)
    monkeypatch.setattr(protected, "RESULTS", tmp_path)

    def make(folder: Path, _: Path | None) -> Path:
        save_onnx(vectors, folder / "model.onnx")
        x = np.random.default_rng(0).random((1200, FEATURES), np.float32)
        np.save(folder / "inputs.npy", x)
        return folder / "inputs.npy"

    recipe = (make, "--work", "0.5", "--k", "3", "--task", "classify")
    monkeypatch.setattr(protected, "RECIPES", {"own": recipe})
    report = protected.run("own", tmp_path / "out", None, 5.0)
    assert (tmp_path / "own.json").is_file()
    assert "| own | " in report["table"]
    assert report["table"] == protected.run(None, None, None, 5.0)["table"]
