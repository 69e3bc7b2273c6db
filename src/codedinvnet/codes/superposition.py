"""Superposition: one network computes on the sum of all members, each bound to a key of its own.

Murahari et al., *DataMUX: Data Multiplexing for Neural Networks*, NeurIPS 2022; Menet et al.,
*MIMONets: Multiple-Input-Multiple-Output Neural Networks Exploiting Computation in Superposition*,
NeurIPS 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.backup import BLOCKS, SQUEEZE
from codedinvnet.codes.grouped import GroupMethod, GroupNetwork
from codedinvnet.codes.method import Given
from codedinvnet.nn.layers import space_to_depth
from codedinvnet.nn.resnet import ResNet

CELLS = 2
"""The last maps are averaged over so many rows and columns before a member is unbound."""


class SuperposedNetwork(GroupNetwork):
    """A residual network whose first layer sees every member, and whose others see their sum.

    Member i's first maps are multiplied by a key for each channel and added to the others'. Behind
    the last stage a second key picks member i out again, and two layers, shared by all members,
    classify it. Keys begin as random signs, which are nearly orthogonal, and are trained.

    Args:
        k: members of a group.
        shape: (C, H, W) of an image.
        classes: number of classes.
        width: channels of the first stage.
    """

    def __init__(self, k: int, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__(k)
        self.network = ResNet(shape[0], classes, width=width, blocks=BLOCKS, squeeze=SQUEEZE)
        last = self.network.features * CELLS**2
        self.bind = nn.Parameter(_signs(k, width))
        self.unbind = nn.Parameter(_signs(k, last))
        self.network.classify = nn.Sequential(
            nn.Linear(last, last // 2),
            nn.LayerNorm(last // 2),
            nn.GELU(),
            nn.Linear(last // 2, classes),
        )

    def full(self, groups: Tensor) -> Tensor:
        net = self.network
        first = F.relu(net.norm(net.stem(space_to_depth(groups.flatten(0, 1), net.squeeze))))
        first = first.unflatten(0, groups.shape[:2])
        summed = torch.einsum("kc,bkchw->bchw", self.bind, first) / self.places**0.5
        read = F.adaptive_avg_pool2d(net.stages(summed), CELLS).flatten(1)
        logits: Tensor = net.classify(read[:, None] * self.unbind)
        return logits


def _signs(*shape: int) -> Tensor:
    return torch.randint(2, shape).mul(2).sub(1).float()


class Superposition(GroupMethod):
    """One network computes on the sum of all members and answers for everybody."""

    name = "superposition"

    def network(self, given: Given, width: int) -> GroupNetwork:
        return SuperposedNetwork(given.k, given.shape, given.classes, width)
