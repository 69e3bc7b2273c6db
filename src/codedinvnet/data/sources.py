"""Image sources: sets held in memory, and rows of them.

Images stay as they were stored, uint8 in 0 to 255; the network pads and scales them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from codedinvnet.common.errors import UserError

Split = Literal["train", "test"]


class ImageSource(ABC):
    """Labelled images of one size, read by index.

    Attributes:
        name: The image set's name.
        classes: Class names; label i is `classes[i]`.
        shape: Size of every image, (channels, height, width).
        source: Where the images were read; named in error messages, and kept with results.
        labels: All labels, (N,) int64.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    source: str
    labels: Tensor

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    @abstractmethod
    def digest(self) -> str:
        """Return a short digest of the images and their order, which decides what they are for."""

    @abstractmethod
    def image_digests(self) -> Tensor:
        """Return a digest of each image and its label, (N,) int64, whatever its place.

        Equal images of one label have equal digests.
        """

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) uint8 in 0 to 255, and labels (B,), of indices (B,) int64."""


def _image_digest(label: int, content: bytes) -> int:
    """Return a digest of 64 bits, signed."""
    found = hashlib.blake2b(b"%d:" % label + content, digest_size=8)
    return int.from_bytes(found.digest(), "little", signed=True)


@dataclass(eq=False, repr=False)
class ImageSet(ImageSource):
    """An image set held in memory.

    Attributes:
        images: (N, C, H, W) uint8 in 0 to 255. For the others see `ImageSource`.

    Raises:
        UserError: If there are no images, or labels do not fit them or the classes.
    """

    name: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    source: str = "memory"

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.numel() == 0:
            raise UserError(f"{self.source}: images is empty, shape {tuple(images.shape)}")
        if len(labels) != len(images):
            raise UserError(f"{self.source}: {len(images)} images but {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"{self.source}: labels run from {low} to {high}, outside the "
                f"{len(self.classes)} classes of {self.name!r} (0 to {len(self.classes) - 1})"
            )
        _, channels, height, width = images.shape
        self.shape = channels, height, width

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"ImageSet({self.name!r}: {len(self)} images {size} of {len(self.classes)} classes)"

    def digest(self) -> str:
        found = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels):
            found.update(part.contiguous().numpy().data)
        return found.hexdigest()[:16]

    def image_digests(self) -> Tensor:
        pairs = zip(self.labels.tolist(), self.images.numpy(), strict=True)
        return torch.tensor([_image_digest(label, image.tobytes()) for label, image in pairs])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class ImageRows(ImageSource):
    """Some images of a source, read from it when they are asked for.

    Args:
        whole: The source.
        rows: Which of its images, (N,) int64.
        source: What to call them; named in error messages.

    Raises:
        UserError: If there are no rows.
    """

    def __init__(self, whole: ImageSource, rows: Tensor, source: str) -> None:
        if not len(rows):
            raise UserError(f"{source}: no images of {whole.source} are in it")
        self.whole, self.rows, self.source = whole, rows, source
        self.name, self.classes, self.shape = whole.name, whole.classes, whole.shape
        self.labels = whole.labels[rows]

    def digest(self) -> str:
        listed = repr((self.whole.digest(), self.rows.tolist()))
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    def image_digests(self) -> Tensor:
        return self.whole.image_digests()[self.rows]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole.batch(self.rows[indices])
