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


class SuperposedNetwork(GroupNetwork):
    """A residual network whose first layer sees every member, and whose others see their sum.

    Member i's first maps are multiplied by a key for each channel, as in DataMUX, and added to the
    others'. Keys begin as random signs, which are nearly orthogonal, and are trained. Of the last
    stage's mean a layer for each member picks out what is his, as in MIMONets, and another one,
    shared by all, classifies it.

    Args:
        k: members of a group.
        shape: (C, H, W) of an image.
        classes: number of classes.
        width: channels of the first stage.
    """

    def __init__(self, k: int, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__(k)
        self.network = ResNet(shape[0], classes, width=width, blocks=BLOCKS, squeeze=SQUEEZE)
        self.bind = nn.Parameter(torch.randint(2, (k, width)).mul(2).sub(1).float())
        features = self.network.features
        self.unbind = nn.Sequential(nn.Linear(features, k * features), nn.ReLU())

    def full(self, groups: Tensor) -> Tensor:
        net = self.network
        first = F.relu(net.norm(net.stem(space_to_depth(groups.flatten(0, 1), net.squeeze))))
        first = first.unflatten(0, groups.shape[:2])
        summed = torch.einsum("kc,bkchw->bchw", self.bind, first) / self.places**0.5
        read = net.stages(summed).mean(dim=(2, 3))
        logits: Tensor = net.classify(self.unbind(read).unflatten(1, (self.places, -1)))
        return logits


class Superposition(GroupMethod):
    """One network computes on the sum of all members and answers for everybody."""

    name = "superposition"
    rank = 3
    version = 2

    def network(self, given: Given, width: int) -> GroupNetwork:
        return SuperposedNetwork(given.k, given.shape, given.classes, width)
