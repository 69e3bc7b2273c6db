"""Files and checks that the tests of both command lines share."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import WEIGHTS
from tests.conftest import tiny_settings, write_settings

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Return one in which a child computes with as many threads as this process."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


class Scene:
    """Files that the bad commands of the table below name."""

    def __init__(self, root: Path, data_dir: Path, run: stages.Run) -> None:
        self.root, self.data = root, data_dir
        self.runs = Path(shutil.copytree(run.save_dir, root / "runs"))
        self.bundle = self.runs / "tiny-recovery" / "fusion-k4" / "bundle"
        self.config = write_settings(root / "recovery.json", tiny_settings())
        self.pixels = write_settings(root / "pixels.json", tiny_settings("pixels"))
        self.cut = Path(shutil.copytree(self.bundle, root / "cut"))
        weights = self.cut / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-100])
        self.large = root / "large"
        (self.large / "mnist").mkdir(parents=True)
        for split in ("train", "test"):
            images = np.zeros((900, 32, 32), dtype=np.uint8)
            np.savez(self.large / "mnist" / split, images=images, labels=np.arange(900) % 10)
        self.untested = Path(shutil.copytree(data_dir, root / "untested"))
        (self.untested / "mnist" / "test.npz").unlink()

    def changed(self, section: str, key: str, value: Any) -> Path:
        raw = deepcopy(tiny_settings())
        raw[section][key] = value
        return write_settings(self.root / "changed.json", raw)


def check_refusal(code: int, out: str, err: str, said: str) -> None:
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]
