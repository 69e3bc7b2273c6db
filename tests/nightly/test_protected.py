"""The benchmark of protected models: one is made and served in short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import protected, protected_serving
from codedinvnet.common.grid import read_rows
from codedinvnet.protect import distil
from tests.models.factories import save_onnx
from tests.protect.factories import FEATURES, vectors

pytestmark = pytest.mark.nightly


def test_a_model_is_protected_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 60)
    monkeypatch.setattr(protected, "RESULTS", tmp_path)
    monkeypatch.setattr(protected, "SERVING", tmp_path / "serving.jsonl")
    monkeypatch.setattr(protected_serving, "QUERIES", 60)
    monkeypatch.setattr(protected_serving, "STRAGGLERS", ("none",))
    monkeypatch.setattr(protected_serving, "ARMS", {"auto": "auto"})

    def make(folder: Path, _: Path | None) -> Path:
        save_onnx(vectors, folder / "model.onnx")
        x = np.random.default_rng(0).random((1200, FEATURES), np.float32)
        np.save(folder / "inputs.npy", x)
        return folder / "inputs.npy"

    recipe = protected.Recipe(make, ("--work", "0.5", "--k", "3", "--task", "classify"))
    monkeypatch.setattr(protected, "RECIPES", {"own": recipe})
    report = protected.run("own", tmp_path / "out", None, 5.0, serve=True)
    assert (tmp_path / "own.json").is_file()
    assert "| own | " in report["table"]
    assert report["table"] == protected.run(None, None, None, 5.0)["table"]
    (row,) = read_rows(tmp_path / "serving.jsonl", "protected-serving")
    assert row["error"] is None
    assert row["direct_equal"] == row["direct"] > 30
    assert "| own | none | auto |" in report["table"]
