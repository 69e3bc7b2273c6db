"""Images and settings that fit each other, checked before a stage takes its hours."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor

from codedinvnet.common.config import PixelFusionSettings, Settings, with_members
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSource, settings_split
from codedinvnet.models.bundle import Bundle
from codedinvnet.models.coded import build_model, model_settings

LEAST_FOUND = 0.95
"""Share of the images set aside that a source must have. Copies of CIFAR-10 differ in one image of
600."""


def check_settings(settings: Settings, source: ImageSource, members: int) -> None:
    """Refuse settings that some stage of a run could not work with."""
    fusion = with_members(settings, members).fusion
    train, validation = settings_split(settings, source)
    for rows, part in ((train, "training"), (validation, "validation")):
        if len(rows) < members:
            raise UserError(
                f"groups of {members} cannot be drawn from {len(rows)} {part} images: "
                "change data.validation or the group size"
            )
    with torch.device("meta"):  # shapes without weights
        model = build_model(model_settings(settings, source.shape, source.classes))
    if isinstance(fusion, PixelFusionSettings):
        check_pixels(fusion, min(model.input_shape[1:]))


def check_images(
    source: ImageSource, shape: tuple[int, ...], classes: tuple[str, ...], whose: str
) -> None:
    """Make sure that images fit what was trained on others, or on these before."""
    if source.shape != shape:
        raise UserError(
            f"{source.source} has images of shape {source.shape}, but {whose} takes {shape}"
        )
    for label, (found, expected) in enumerate(zip_longest(source.classes, classes)):
        if found != expected:
            raise UserError(
                f"{source.source} has other classes than {whose}: label {label} is "
                f"{found or 'none'} instead of {expected or 'none'}"
            )


def check_same_images(source: ImageSource, digest: str, whose: str) -> None:
    """Make sure that training images are those of an earlier training, in the same order.

    The order decides which ones are kept for validation.
    """
    if digest != source.digest():
        raise UserError(
            f"{source.source} has other training images than {whose} was trained on, or has them "
            "in another order: some that were trained on would count as validation images"
        )


def check_pixels(fusion: PixelFusionSettings, side: int) -> None:
    """Refuse a training by the paper's objective that takes no step or has no discriminator."""
    needed = fusion.batch_size * fusion.discriminator_steps
    if fusion.groups < needed:
        raise UserError(
            f"fusion.groups {fusion.groups} do not make one step: one needs "
            f"batch_size x discriminator_steps = {needed}"
        )
    if side >> fusion.discriminator_layers < 3:  # two convolutions of 4x4 follow the halvings
        raise UserError(
            f"fusion.discriminator_layers {fusion.discriminator_layers} are too many for "
            f"images of {side} pixels"
        )


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
    if made.images == source.digest():
        return settings_split(made.settings, source)
    kept, digests = bundle.validation_digests(), source.image_digests()
    aside = torch.isin(digests, kept)
    found, trained = int(torch.isin(kept, digests).sum()), int((~aside).sum())
    if found < LEAST_FOUND * len(kept) or not trained:
        raise UserError(
            f"{source.source} has other training images than {whose} was trained on: it has "
            f"{found} of the {len(kept)} that were set aside for validation, and {trained} others"
        )
    return (~aside).nonzero().flatten(), aside.nonzero().flatten()
