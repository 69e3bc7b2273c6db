"""Transforms in float64 as a training leaves them, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.nn.iresnet import IResNet, IResNetBlock
from codedinvnet.nn.irevnet import CouplingBlock, IRevNet
from codedinvnet.nn.layers import ActNorm, Squeeze
from codedinvnet.nn.lipschitz import constrain_exactly, constrained_layers
from codedinvnet.nn.transform import InvertibleTransform

Shape = tuple[int, int, int]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(module: InvertibleTransform) -> InvertibleTransform:
    """Give a module what training would: statistics off their start, kernels at their bound."""
    for index, part in enumerate(module.modules()):
        if isinstance(part, ActNorm):
            part.shift.copy_(noise(len(part.shift), seed=index))
            part.log_scale.copy_(0.4 * noise(len(part.log_scale), seed=index + 1))
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.copy_(noise(part.num_features, seed=index))
            part.running_var.copy_(noise(part.num_features, seed=index + 1).exp())
            part.weight.copy_(noise(part.num_features, seed=index + 2))
            part.bias.copy_(noise(part.num_features, seed=index + 3))
    for layer in constrained_layers(module):
        layer.weight.mul_(10.0)
    constrain_exactly(module)
    return module.double().eval().requires_grad_(False)


def block(*, first: bool = False, coefficient: float = 0.9) -> IResNetBlock:
    torch.manual_seed(0)
    made = trained(IResNetBlock(2, 5, (3, 4), coefficient=coefficient, first=first).double())
    assert isinstance(made, IResNetBlock)
    return made


def iresnet(squeeze: int = 2) -> InvertibleTransform:
    torch.manual_seed(1)
    return trained(
        IResNet(
            (1, 4, 4), blocks=(2, 1), strides=(1, 2), hidden=(5, 6), initial_squeeze=squeeze
        ).double()
    )


def irevnet() -> InvertibleTransform:
    torch.manual_seed(2)
    return trained(IRevNet((1, 4, 4), blocks=(2, 1), strides=(1, 2), hidden=(3, 5)).double())


def coupling(*, first: bool) -> InvertibleTransform:
    torch.manual_seed(3)
    return trained(CouplingBlock(4, 3, first=first).double())


@dataclass(frozen=True)
class Case:
    build: Callable[[], InvertibleTransform]
    input_shape: Shape
    output_shape: Shape


BLOCKS = {
    f"block-{'first' if first else 'inner'}": Case(
        lambda first=first: block(first=first),  # type: ignore[misc]
        (2, 3, 4),
        (2, 3, 4),
    )
    for first in (True, False)
}


CASES = {
    "squeeze-2": Case(lambda: Squeeze(2), (3, 4, 6), (12, 2, 3)),
    "squeeze-3": Case(lambda: Squeeze(3), (1, 6, 3), (9, 2, 1)),
    "actnorm": Case(lambda: trained(ActNorm(3)), (3, 2, 4), (3, 2, 4)),
    **BLOCKS,
    "coupling-first": Case(lambda: coupling(first=True), (4, 3, 2), (4, 3, 2)),
    "coupling-inner": Case(lambda: coupling(first=False), (4, 3, 2), (4, 3, 2)),
    "iresnet": Case(iresnet, (1, 4, 4), (16, 1, 1)),
    "iresnet-unsqueezed": Case(lambda: iresnet(squeeze=1), (1, 4, 4), (4, 2, 2)),
    "irevnet": Case(irevnet, (1, 4, 4), (16, 1, 1)),
}


NETWORKS = {name: case for name, case in CASES.items() if name.startswith("ire")}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())
