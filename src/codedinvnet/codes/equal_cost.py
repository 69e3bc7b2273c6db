"""How wide the rivals' plain networks may be, by the multiply-adds of what they are beside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from codedinvnet.models.coded import CodedModel
from codedinvnet.nn.resnet import ResNet, width_of_cost


def count_macs(call: Callable[[], Any]) -> int:
    """Count the multiply-adds of convolutions and matrix products in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops()) // 2


def macs(network: nn.Module, model: CodedModel) -> int:
    """Return the multiply-adds of a network on the CPU for one padded image of a model."""
    return count_macs(lambda: network(torch.rand(1, *model.input_shape)))


def served_macs(model: CodedModel) -> int:
    """Return those of g(f(x)) for one image."""
    own = copy.deepcopy(model).to("cpu")
    return macs(nn.Sequential(own.network, own.head), own)


def width_within(make: Callable[[int], nn.Module], model: CodedModel, budget: int) -> int:
    """Return the largest width of a network that costs no more than so many multiply-adds."""
    return width_of_cost(lambda width: macs(make(width).eval(), model), budget)


def plain_network(model: CodedModel, width: int) -> ResNet:
    """Return an untrained plain base model of a width, for padded images of a model."""
    return ResNet(model.input_shape[0], len(model.settings.classes), width=width)


def plain_width(model: CodedModel) -> int:
    """Return the width of the plain base model: the largest that costs no more than g(f(x))."""
    return width_within(lambda width: plain_network(model, width), model, served_macs(model))
