"""The example that trains an ordinary classifier, on a few images."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.models import open_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_resnet.py"


def test_the_example_leaves_a_model_that_can_be_protected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = generator.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(40) % 3)
    words = [str(EXAMPLE), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--epochs", "1", "--width", "16", "--blocks", "1", "1", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's of its exporter
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(40) // 36)
    with pytest.raises(SystemExit, match="2"):  # all of one class would validate
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    signature = open_model(tmp_path / "out" / "resnet.onnx").signature
    assert [(spec.name, spec.shape) for spec in signature.inputs] == [("pixels", (3, 8, 8))]
    assert signature.scores is not None
    assert 0 <= json.loads((tmp_path / "out" / "accuracy.json").read_text())["test_accuracy"] <= 1
