"""File formats of image sets: .npz of named arrays, MNIST's idx files, and CIFAR-10's batches."""

from __future__ import annotations

import gzip
import math
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from codedinvnet.common.errors import UserError, nearest
from codedinvnet.data.sources import ImageSet, Split

_DAMAGED = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise on a damaged .npz file."""
_MOST_CLASSES = 100_000
"""Labels above this are a mistake."""


def read_npz(stream: IO[bytes], name: str, source: str, known: tuple[str, ...] = ()) -> ImageSet:
    """Read images (N, H, W) or (N, H, W, C), labels (N,), and maybe classes.

    Args:
        stream: the file.
        name: the image set's name.
        source: the file's name, for messages.
        known: the classes, if the file does not name them; (): numbers.
    """
    try:
        archive = np.load(stream, allow_pickle=False)  # without pickle a file cannot run code
    except _DAMAGED as error:
        raise UserError(f"{source}: not a whole .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{source}: not an .npz file of named arrays")

    def array(key: str) -> NDArray[Any]:
        if key not in archive.files:
            near = nearest(key, archive.files)
            hint = f" (did you mean {near!r}?)" if near else ""
            there = ", ".join(archive.files) or "nothing"
            raise UserError(f"{source}: array {key!r} is missing{hint}; it holds {there}")
        try:
            found: NDArray[Any] = archive[key]
        except _DAMAGED as error:
            raise UserError(f"{source}: array {key!r} is unreadable: {error}") from error
        return found

    with archive:
        images, labels = array("images"), array("labels")
        classes = array("classes") if "classes" in archive.files else None
    if images.dtype != np.uint8:
        raise UserError(f"{source}: array 'images' is {images.dtype}, not uint8 (0 to 255)")
    if not (images.ndim == 3 or (images.ndim == 4 and 1 <= images.shape[3] <= 4)):
        raise UserError(
            f"{source}: array 'images' has shape {images.shape}, not (N, H, W) or (N, H, W, C) "
            "with 1 to 4 channels"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(
            f"{source}: array 'labels' is {labels.dtype} of shape {labels.shape}, not one row of "
            "whole numbers"
        )
    if classes is not None and (classes.dtype.kind != "U" or classes.ndim != 1):
        raise UserError(f"{source}: array 'classes' must be one row of strings")
    highest = int(labels.max(initial=0))
    if highest >= _MOST_CLASSES:
        raise UserError(f"{source}: array 'labels' holds {highest}; labels are numbered from 0")
    names = known if classes is None else tuple(map(str, classes))
    pixels = torch.from_numpy(images[..., None] if images.ndim == 3 else images)
    return ImageSet(
        name=name,
        classes=names or tuple(map(str, range(highest + 1))),
        images=pixels.permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        source=source,
    )


def read_idx_pair(
    folder: Path, name: str, split: Split, classes: tuple[str, ...]
) -> ImageSet | None:
    """Read MNIST's two files of a split, plain or .gz; None if neither is there."""
    prefix = "train" if split == "train" else "t10k"
    found: list[NDArray[np.uint8]] = []
    missing: list[str] = []
    for stem, rank in ((f"{prefix}-images-idx3-ubyte", 3), (f"{prefix}-labels-idx1-ubyte", 1)):
        paths = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
        if paths:
            found.append(_read_idx(paths[0], rank))
        else:
            missing.append(stem)
    if not found:
        return None
    if missing:
        raise UserError(f"{folder / missing[0]} is missing (or the same with .gz)")
    images, labels = found
    return ImageSet(
        name=name,
        classes=classes,
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels).long(),
        source=str(folder),
    )


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes: two zeros, type 8, rank, big-endian sizes, then the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = bytearray(stream.read())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: unreadable: {error}; delete it and fetch it again") from error
    magic, header = bytes((0, 0, 8, rank)), 4 + 4 * rank
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if content[:4] != magic or len(content) != header + math.prod(sizes):
        raise UserError(
            f"{path}: damaged, cut short, or not an idx file of {rank}-dimensional bytes; "
            "delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def read_cifar10(root: Path, split: Split, classes: tuple[str, ...]) -> ImageSet:
    """Read torchvision's files of CIFAR-10 below root; it checks their md5 before unpickling."""
    from torchvision import datasets  # takes as long to import as PyTorch

    folder = root / datasets.CIFAR10.base_folder
    try:
        with warnings.catch_warnings():
            # The batches were pickled by an old numpy; a new one warns of that.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            found = datasets.CIFAR10(root, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder}: a file of CIFAR-10 is missing or damaged (its md5 differs); "
            "delete the folder and fetch it again"
        ) from error
    return ImageSet(
        name="cifar10",
        classes=classes,
        images=torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(found.targets, dtype=torch.int64),
        source=str(folder),
    )
