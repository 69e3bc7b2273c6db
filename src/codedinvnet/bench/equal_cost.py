"""How wide the rivals' plain networks may be, by the multiply-adds of what they are beside."""

from __future__ import annotations

import copy

import torch
from torch import nn

from codedinvnet.evaluation.cost import count_macs
from codedinvnet.model import CodedModel
from codedinvnet.nn.resnet import ResNet, width_of_cost
from codedinvnet.trained import backup_network


def macs(network: nn.Module, model: CodedModel) -> int:
    """Return the multiply-adds of a network on the CPU for one padded image of a model."""
    return count_macs(lambda: network(torch.rand(1, *model.input_shape)))


def served_macs(model: CodedModel) -> int:
    """Return those of g(f(x)) for one image."""
    own = copy.deepcopy(model).to("cpu")
    return macs(nn.Sequential(own.network, own.head), own)


def plain_network(model: CodedModel, width: int) -> ResNet:
    """Return an untrained plain base model of a width, for padded images of a model."""
    return ResNet(model.input_shape[0], len(model.settings.classes), width=width)


def plain_width(model: CodedModel) -> int:
    """Return the width of the plain base model: the largest that costs no more than g(f(x))."""
    return width_of_cost(
        lambda width: macs(plain_network(model, width).eval(), model), served_macs(model)
    )


def backup_width(model: CodedModel, k: int) -> int:
    """Return the width of the small backup: the largest that costs no more than 1/k of g(f(x))."""
    return width_of_cost(
        lambda width: macs(backup_network(model, width).eval(), model), served_macs(model) // k
    )
