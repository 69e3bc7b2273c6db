"""Collage Inference: one network reads a picture of all members, each shrunk to a cell.

Narra, Lin, Ananthanarayanan, Avestimehr & Annavaram, *Collage Inference: Tolerating Stragglers in
Distributed Neural Network Inference using Coding*, 2019 (arXiv 1904.12222, 1906.03999).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.backup import BLOCKS, SQUEEZE, BackupCode
from codedinvnet.codes.base import Encoded, Scheme
from codedinvnet.codes.equal_cost import count_macs, served_macs
from codedinvnet.codes.method import ONE, Given, Method, Tolerance
from codedinvnet.codes.rules import PARITY_MODEL, AnswersAll, CodeRules, Costs
from codedinvnet.common.config import PartSettings
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import prepare
from codedinvnet.nn.resnet import ResNet, width_of_cost

if TYPE_CHECKING:
    from codedinvnet.training.part import TrainingData

STRIDE = SQUEEZE * 2 ** (len(BLOCKS) - 1)
"""How many pixels a place of the last maps stands for; a cell's side is a multiple of it."""


def collage_grid(k: int) -> tuple[int, int]:
    """Return the rows and columns of the squarest grid with k cells or little more."""
    rows = math.isqrt(k)
    return rows, math.ceil(k / rows)


class CollageNetwork(nn.Module):
    """A residual network over the collage, which classifies every cell of its last maps.

    A collage is larger than an image, as the published ones are. Pixels become channels first, as
    in the small backup. A cell's side is twice that of an image over √k, rounded up to what the
    last maps can tell apart, and at most the image's own. So the first layer has 0.6 to 2.2 times
    as many places as one image has pixels. Cells without a member are black. The members of a
    group smaller than k take turns in the cells, so that the network sees what it was trained on.

    Args:
        k: members of a group.
        shape: (C, H, W) of an image.
        classes: number of classes.
        width: channels of the first stage.
    """

    def __init__(self, k: int, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.k, self.grid = k, collage_grid(k)
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
        cells = F.pad(cells, (0,) * 7 + (rows * columns - self.k,))
        laid: Tensor = cells.unflatten(1, self.grid).permute(0, 3, 1, 4, 2, 5)
        return laid.reshape(len(groups), -1, rows * height, columns * width)

    def forward(self, groups: Tensor) -> Tensor:
        """Map groups (B, m, C, H, W) of floats, m at most k, to logits (B, m, classes)."""
        members = groups.shape[1]
        shown = groups[:, torch.arange(self.k, device=groups.device) % members]
        maps = self.network.maps(self.collage(shown))
        read = F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)
        logits: Tensor = self.network.classify(read[:, : self.k])
        return logits[:, :members]


class CollageCode(BackupCode):
    """Task k sends the scores of all members, which one network finds at once."""

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return the groups (B, m, C, H, W) as they are, scaled to 0..1."""
        return Encoded(prepare(queries, 0))


class Collage(Method):
    """One network reads a collage of the group and answers for everybody.

    The published network is a detector. This one is built as the small backup, as wide as its cost
    allows, and trained like it, on as many images.
    """

    name = "collage"
    rank = 2
    version = 2
    part = "backup"
    cost = 1.0

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return AnswersAll(k, PARITY_MODEL, encoded=True, cost=Costs(group=self.cost))

    def made_with(self, given: Given, settings: Any) -> Mapping[str, Any]:
        group = torch.rand(1, given.k, *given.shape)

        def cost(width: int) -> int:
            network = self.untrained(given, {"width": width}).eval()
            return count_macs(lambda: network(group))

        return {"width": width_of_cost(cost, int(self.cost * served_macs(given.coded)))}

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        return CollageNetwork(given.k, given.shape, given.classes, int(made_with["width"]))

    def fit(self, teacher: Given, data: TrainingData, budget: PartSettings) -> nn.Module:
        part = self.start(teacher, data)
        return data.fit_members(part, self.build(replace(teacher, part=part)), budget)

    def build(self, given: Given) -> Scheme:
        assert given.part is not None
        return self.scheme(CollageCode(self.rules(given.k)), given, **{PARITY_MODEL: given.part})
