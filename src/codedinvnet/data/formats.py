"""File formats: .npz of named arrays, MNIST's idx files, and CIFAR-10's batches."""

from __future__ import annotations

import gzip
import math
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from codedinvnet.data.names import KNOWN, did_you_mean
from codedinvnet.data.sources import ImageSet, Split
from codedinvnet.errors import UserError

# What numpy and zipfile raise on a damaged .npz file.
_DAMAGED = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_MOST_CLASSES = 100_000  # labels above this are a mistake, not classes


def read_npz(stream: IO[bytes], name: str, source: str) -> ImageSet:
    """Read images (N,H,W) or (N,H,W,C), labels (N,), and classes if it is there."""
    classes = None
    try:
        # Without pickle a file cannot run code.
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{source}: not an .npz file of named arrays")
        with archive:
            images = _npz_array(archive, "images", source)
            labels = _npz_array(archive, "labels", source)
            if "classes" in archive.files:
                classes = _npz_array(archive, "classes", source)
    except _DAMAGED as error:
        raise UserError(f"{source}: not a whole .npz file: {error}") from error

    if images.dtype != np.uint8:
        nan = " with NaN in it" if images.dtype.kind == "f" and np.isnan(images).any() else ""
        raise UserError(f"{source}: array 'images' is {images.dtype}{nan}, not uint8 (0 to 255)")
    if images.ndim not in (3, 4):
        raise UserError(f"{source}: array 'images' has shape {images.shape}, not N,H,W or N,H,W,C")
    if images.ndim == 4 and not 1 <= images.shape[3] <= 4:
        raise UserError(
            f"{source}: array 'images' has shape {images.shape}: its last dimension must be the "
            f"1 to 4 channels (N,H,W,C)"
        )
    if labels.dtype.kind not in "iu":
        raise UserError(f"{source}: array 'labels' is {labels.dtype}, not whole numbers")
    if labels.ndim != 1:
        raise UserError(f"{source}: array 'labels' has shape {labels.shape}, not one row")
    if images.ndim == 3:
        images = images[..., None]
    return ImageSet(
        name=name,
        classes=_class_names(name, labels, classes, source),
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        source=source,
    )


def _npz_array(archive: np.lib.npyio.NpzFile, key: str, source: str) -> NDArray[Any]:
    if key not in archive.files:
        there = ", ".join(archive.files) or "nothing"
        hint = did_you_mean(key, archive.files)
        raise UserError(f"{source}: array {key!r} is missing{hint}; it holds {there}")
    try:
        array: NDArray[Any] = archive[key]
    except _DAMAGED as error:
        raise UserError(f"{source}: array {key!r} is unreadable: {error}") from error
    return array


def _class_names(
    name: str, labels: NDArray[Any], classes: NDArray[Any] | None, source: str
) -> tuple[str, ...]:
    if classes is not None:
        if classes.dtype.kind != "U" or classes.ndim != 1:
            raise UserError(f"{source}: array 'classes' must be one row of strings")
        return tuple(str(each) for each in classes)
    if name in KNOWN:
        return KNOWN[name].classes
    highest = int(labels.max(initial=0))
    if highest >= _MOST_CLASSES:
        raise UserError(f"{source}: array 'labels' holds {highest}; labels are numbered from 0")
    return tuple(str(label) for label in range(highest + 1))


def read_idx_pair(folder: Path, name: str, split: Split) -> ImageSet | None:
    """Read MNIST's two files of a split, plain or .gz; None if neither is there."""
    prefix = "train" if split == "train" else "t10k"
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    paths = [
        next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
        for stem in stems
    ]
    if paths == [None, None]:
        return None
    for path, stem in zip(paths, stems, strict=True):
        if path is None:
            raise UserError(f"{folder / stem} is missing (or the same with .gz)")
    images, labels = (
        _read_idx(path, dimensions)
        for path, dimensions in zip(paths, (3, 1), strict=True)
        if path is not None
    )
    return ImageSet(
        name=name,
        classes=KNOWN[name].classes,
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels.astype(np.int64)),
        source=str(folder),
    )


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes: two zeros, type 8, rank, big-endian sizes, then the bytes."""
    content, whole = _read_bytes(path)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise UserError(f"{path}: {len(content)} bytes, too short for an idx header of {header}")
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise UserError(
            f"{path}: not an idx file of {dimensions}-dimensional bytes: it starts with "
            f"{content[:4].hex()}, not {magic.hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected or not whole:
        raise UserError(
            f"{path}: damaged or cut short: its header asks for {expected} bytes in all, "
            f"{len(content)} were found; delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> tuple[bytearray, bool]:
    """Read a plain or .gz file: its bytes, and whether a .gz reached its end."""
    content = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while chunk := stream.read1(1 << 20):
                content += chunk
    except EOFError:
        return content, False
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    return content, True


def read_cifar10(root: Path, split: Split) -> ImageSet:
    """Read torchvision's files of CIFAR-10, which lie below root."""
    from torchvision import datasets  # takes as long to import as PyTorch

    folder = root / KNOWN["cifar10"].folder
    try:
        with warnings.catch_warnings():
            # The batches were pickled by an old numpy; a new one warns of that.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            # Checks each file's md5 before it unpickles it.
            found = datasets.CIFAR10(root, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder}: a file of CIFAR-10 is missing or damaged (its md5 differs); "
            f"delete the folder and fetch it again"
        ) from error
    return ImageSet(
        name="cifar10",
        classes=KNOWN["cifar10"].classes,
        images=torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(found.targets, dtype=torch.int64),
        source=str(folder),
    )
