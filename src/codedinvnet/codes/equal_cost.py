"""What methods cost in multiply-adds, and how wide the rivals' plain networks may be for that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from codedinvnet.codes.base import Scheme
from codedinvnet.common.devices import first_tensor
from codedinvnet.models.coded import CodedModel
from codedinvnet.nn.resnet import ResNet, width_of_cost


def count_macs(call: Callable[[], Any]) -> int:
    """Count the multiply-adds of convolutions and matrix products in a call."""
    own = {  # PyTorch has no formulas for these
        torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter, torch.no_grad():
        call()
    flops: int = counter.get_total_flops()
    return flops // 2


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def macs(network: nn.Module, model: CodedModel) -> int:
    """Return the multiply-adds of a network, wherever it is, for one padded image of a model."""
    device = first_tensor(network).device
    return count_macs(lambda: network(torch.rand(1, *model.input_shape, device=device)))


def served_macs(model: CodedModel) -> int:
    """Return those of g(f(x)) for one image."""
    return macs(nn.Sequential(model.network, model.head), model)


def extra_macs(scheme: Scheme) -> int:
    """Return the multiply-adds of the extra tasks of a full group, encoding included."""
    k = scheme.rules.k
    groups = {
        number: torch.zeros(1, len(task.members), *scheme.shape)
        for number, task in scheme.rules.tasks(k).items()
        if number >= k
    }
    return count_macs(lambda: [scheme.compute(number, group) for number, group in groups.items()])


def direct_macs(scheme: Scheme) -> int:
    """Return the multiply-adds of a query that a systematic code's data task answers."""
    query = torch.zeros(1, 1, *scheme.shape)
    return count_macs(lambda: scheme.direct(scheme.compute(0, query).output))


def width_within(make: Callable[[int], nn.Module], model: CodedModel, budget: int) -> int:
    """Return the largest width of a network that costs no more than so many multiply-adds."""
    return width_of_cost(lambda width: macs(make(width).eval(), model), budget)


def plain_network(model: CodedModel, width: int) -> ResNet:
    """Return an untrained plain base model of a width, for padded images of a model."""
    return ResNet(model.input_shape[0], len(model.classes), width=width)


def plain_width(model: CodedModel) -> int:
    """Return the width of the plain base model: the largest that costs no more than g(f(x))."""
    return width_within(lambda width: plain_network(model, width), model, served_macs(model))
