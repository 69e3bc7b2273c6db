"""Small image sets, written in each of the layouts, and read back."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codedinvnet.data import ImageSource

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def write_npz(root: Path, name: str = "own", split: str = "train", **arrays: Any) -> Path:
    path = root / name / f"{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    magic = bytes((0, 0, 8, array.ndim))
    return magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path) -> None:
    """Write the four files of MNIST, both splits alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(GREY))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))


def everything(source: ImageSource) -> tuple[NDArray[np.uint8], list[int]]:
    images, labels = source.batch(torch.arange(len(source)))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert tuple(images.shape) == (len(source), *source.shape)
    return images.numpy(), labels.tolist()
