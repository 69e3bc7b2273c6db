"""Images set aside for validation, and random coding groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codedinvnet.common.errors import UserError
from codedinvnet.data.sources import ImageRows, ImageSource

if TYPE_CHECKING:
    from codedinvnet.common.config import Settings


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Set some of `count` images aside for validation; the same ones for a same seed.

    Returns:
        Indices (count - validation,) to train on and (validation,) to validate on, int64, sorted.
    """
    if not 0 <= validation < count:
        raise UserError(
            f"cannot set {validation} of {count} images aside for validation: "
            f"it must be at least 0 and less than {count}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[validation:].sort().values, order[:validation].sort().values


def settings_split(settings: Settings, source: ImageSource) -> tuple[Tensor, Tensor]:
    """Return the rows that a training takes and those that it sets aside (`split_indices`)."""
    return split_indices(len(source), settings.data.validation, settings.seed)


def split_images(settings: Settings, source: ImageSource) -> tuple[ImageRows, ImageRows]:
    """Return the images that a training takes and those that it sets aside (`split_indices`)."""
    train, validation = settings_split(settings, source)
    return (
        ImageRows(source, train, "the training images"),
        ImageRows(source, validation, "the validation images"),
    )


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """Return `count` of the rows (N,), evenly spread; all if there are no more."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count) * len(rows) // count]


@dataclass(frozen=True, eq=False)
class Groups:
    """Coding groups of images.

    Attributes:
        members: (G, k) int64, indices of images; no group holds an image twice.
        counted: (G, k) bool; False where an image only fills a group up, and its answer must
            not count because it is counted in another group.
    """

    members: Tensor
    counted: Tensor


def random_groups(count: int, k: int, generator: torch.Generator) -> Groups:
    """Put images in random coding groups so that each is counted exactly once.

    When k does not divide count, other random images fill the last of the ceil(count / k) groups
    up; these are not counted.
    """
    if not 2 <= k <= count:
        raise UserError(f"groups of k={k} cannot be made of {count} images: k is 2 to {count}")
    order = torch.randperm(count, generator=generator)
    missing = -count % k
    whole = count - count % k  # images in whole groups; only these may fill the last one up
    filling = order[torch.randperm(whole, generator=generator)[:missing]]
    counted = torch.ones(count + missing, dtype=torch.bool)
    counted[count:] = False
    return Groups(torch.cat([order, filling]).reshape(-1, k), counted.reshape(-1, k))
