"""Collage Inference: one network reads a picture of all members, each shrunk to a cell.

Narra, Lin, Ananthanarayanan, Avestimehr & Annavaram, *Collage Inference: Tolerating Stragglers in
Distributed Neural Network Inference using Coding*, 2019 (arXiv 1904.12222, 1906.03999).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from codedinvnet.codes.backup import BLOCKS, SQUEEZE
from codedinvnet.codes.grouped import GroupMethod, GroupNetwork
from codedinvnet.codes.method import Given
from codedinvnet.nn.resnet import ResNet

STRIDE = SQUEEZE * 2 ** (len(BLOCKS) - 1)
"""How many pixels a place of the last maps stands for; a cell's side is a multiple of it."""


def collage_grid(k: int) -> tuple[int, int]:
    """Return the rows and columns of the squarest grid with k cells or little more."""
    rows = math.isqrt(k)
    return rows, math.ceil(k / rows)


class CollageNetwork(GroupNetwork):
    """A residual network over the collage, which classifies every cell of its last maps.

    A collage is larger than an image, as the published ones are. Pixels become channels first, as
    in the small backup. A cell's side is twice that of an image over √k, rounded up to what the
    last maps can tell apart, and at most the image's own. So the first layer has 0.6 to 2.2 times
    as many places as one image has pixels. Cells without a member are black.

    Args:
        k: members of a group.
        shape: (C, H, W) of an image.
        classes: number of classes.
        width: channels of the first stage.
    """

    def __init__(self, k: int, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__(k)
        channels, *sides = shape
        self.grid = collage_grid(k)
        share = min(1.0, SQUEEZE / math.sqrt(k))
        self.cell = tuple(STRIDE * math.ceil(share * side / STRIDE) for side in sides)
        self.network = ResNet(channels, classes, width=width, blocks=BLOCKS, squeeze=SQUEEZE)

    def collage(self, groups: Tensor) -> Tensor:
        """Return the collages (B, C, rows · h, columns · w) of groups (B, k, C, H, W)."""
        (rows, columns), (height, width) = self.grid, self.cell
        cells: Tensor = F.interpolate(
            groups.flatten(0, 1), (height, width), mode="bilinear", antialias=True
        )
        cells = cells.unflatten(0, groups.shape[:2])
        cells = F.pad(cells, (0,) * 7 + (rows * columns - self.places,))
        laid: Tensor = cells.unflatten(1, self.grid).permute(0, 3, 1, 4, 2, 5)
        return laid.reshape(len(groups), -1, rows * height, columns * width)

    def full(self, groups: Tensor) -> Tensor:
        maps = self.network.maps(self.collage(groups))
        read = F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)
        logits: Tensor = self.network.classify(read[:, : self.places])
        return logits


class Collage(GroupMethod):
    """One network reads a collage of the group and answers for everybody.

    The published network is a detector. This one is built as the small backup, and as wide as its
    cost allows.
    """

    name = "collage"
    rank = 2
    version = 2

    def network(self, given: Given, width: int) -> GroupNetwork:
        return CollageNetwork(given.k, given.shape, given.classes, width)
