"""The example that trains an ordinary classifier, on a few images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from codedinvnet.models import open_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_resnet.py"


def test_the_example_leaves_a_model_that_can_be_protected(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = generator.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(40) % 3)
    words = [sys.executable, str(EXAMPLE), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--epochs", "1", "--width", "4", "--blocks", "1", "1", "--batch-size", "4"]
    subprocess.run(words, check=True, timeout=300, stdout=subprocess.DEVNULL)
    signature = open_model(tmp_path / "out" / "resnet.onnx").signature
    assert [(spec.name, spec.shape) for spec in signature.inputs] == [("pixels", (3, 8, 8))]
    assert signature.scores is not None
    assert 0 <= json.loads((tmp_path / "out" / "accuracy.json").read_text())["test_accuracy"] <= 1
