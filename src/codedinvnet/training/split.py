"""Which images a bundle was trained on, and which were set aside for validation."""

from __future__ import annotations

import torch
from torch import Tensor

from codedinvnet.common.config import Settings
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSource, settings_split
from codedinvnet.models.bundle import Bundle
from codedinvnet.training.check import check_same_images

LEAST_FOUND = 0.95
"""Share of the images set aside that a source must have. Copies of CIFAR-10 differ in one image of
600."""


def validation_digests(settings: Settings, source: ImageSource) -> Tensor:
    """Return the digests (V,) of the images that a training sets aside, to be kept in its bundle.

    They are those of `ImageSource.image_digests`.
    """
    return source.image_digests()[settings_split(settings, source)[1]]


def bundle_split(bundle: Bundle, source: ImageSource, whose: str) -> tuple[Tensor, Tensor]:
    """Tell the training images of a bundle from those that were set aside for validation.

    If the source has the images in the order in which the bundle was trained on them, this is the
    training's own split. In another order, the digests that the bundle keeps tell which images were
    set aside, and all others count as trained on. So a training image is scored as a validation
    image only if it equals one, its label included.

    Args:
        bundle: the bundle.
        source: the training images, of the bundle's shape and classes.
        whose: they were; named in errors.

    Returns:
        Rows (T,) of the source that were trained on and (V,) that were set aside, int64, sorted.
    """
    made = bundle.info.provenance
    in_order = made.images in ("", source.digest())  # older releases did not state it
    kept = None if in_order else bundle.validation_digests()
    if kept is None:
        check_same_images(source, made.images, whose)
        return settings_split(made.settings, source)
    digests = source.image_digests()
    aside = torch.isin(digests, kept)
    found, trained = int(torch.isin(kept, digests).sum()), int((~aside).sum())
    if found < LEAST_FOUND * len(kept) or not trained:
        raise UserError(
            f"{source.source} has other training images than {whose} was trained on: it has "
            f"{found} of the {len(kept)} that were set aside for validation, and {trained} others"
        )
    return (~aside).nonzero().flatten(), aside.nonzero().flatten()
