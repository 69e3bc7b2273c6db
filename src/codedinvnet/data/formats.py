"""Image sets in .npz files of named arrays."""

from __future__ import annotations

import zipfile
import zlib
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from codedinvnet.common.errors import UserError, nearest
from codedinvnet.data.sources import ImageSet

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
