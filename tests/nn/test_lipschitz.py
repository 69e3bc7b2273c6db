from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from codedinvnet.nn import lipschitz
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.lipschitz import (
    LipschitzConv2d,
    constrain_exactly,
    constrained_layers,
    fold,
    operator_norm,
    project,
)

COEFFICIENT = 0.8
SHAPES = pytest.mark.parametrize(
    ("inside", "outside", "kernel", "size"),
    [(3, 3, 3, (4, 5)), (5, 2, 3, (4, 4)), (2, 5, 3, (3, 6)), (2, 3, 3, (1, 1)), (4, 6, 1, (3, 3))],
    ids=["square", "in>out", "out>in", "one-pixel", "1x1"],
)


def conv(
    inside: int = 3,
    outside: int = 4,
    kernel: int = 3,
    size: tuple[int, int] = (5, 4),
    *,
    norm: float = 3.0,
) -> LipschitzConv2d:
    torch.manual_seed(0)
    layer = LipschitzConv2d(
        inside, outside, kernel, input_size=size, coefficient=COEFFICIENT
    ).double()
    with torch.no_grad():
        layer.weight.mul_(norm / dense_norm(layer, size))
    return layer


def dense_norm(layer: nn.Conv2d, size: tuple[int, int]) -> float:
    x = torch.zeros(layer.in_channels, *size, dtype=torch.float64)
    matrix = jacobian(lambda v: layer.double()(v[None])[0].flatten(), x).flatten(1)
    return float(torch.linalg.svdvals(matrix)[0])


def network() -> IResNet:
    torch.manual_seed(0)
    net = IResNet(
        (1, 8, 8), blocks=(1, 2), strides=(1, 2), hidden=(6, 5), coefficient=COEFFICIENT
    ).double()
    with torch.no_grad():
        for layer in constrained_layers(net):
            layer.weight.mul_(5.0)
    return net


@SHAPES
@pytest.mark.parametrize("dense_limit", [1024, 1], ids=["dense", "arpack"])
def test_operator_norm_is_the_largest_singular_value(
    inside: int,
    outside: int,
    kernel: int,
    size: tuple[int, int],
    dense_limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lipschitz, "DENSE_LIMIT", dense_limit)
    layer = conv(inside, outside, kernel, size)
    assert operator_norm(layer, size) == pytest.approx(dense_norm(layer, size), rel=2e-6)


@SHAPES
def test_projection_nears_the_bound_and_the_exact_constraint_meets_it(
    inside: int, outside: int, kernel: int, size: tuple[int, int]
) -> None:
    layer = conv(inside, outside, kernel, size)
    bias = layer.bias
    assert bias is not None
    offset = bias.detach().clone()
    for _ in range(60):
        layer.project()
    assert COEFFICIENT * (1 - 1e-9) <= dense_norm(layer, size) <= 1.03 * COEFFICIENT
    layer.constrain_exactly()
    assert COEFFICIENT - 1e-6 <= dense_norm(layer, size) <= COEFFICIENT + 1e-6
    assert torch.equal(bias, offset)


def test_every_convolution_of_a_network_is_constrained() -> None:
    net = network()
    assert len(constrained_layers(net)) == 9
    assert net.largest_singular_value() > 2 * COEFFICIENT
    for _ in range(60):
        project(net, iterations=20)
    assert COEFFICIENT * (1 - 1e-9) <= net.largest_singular_value() <= 1.03 * COEFFICIENT
    constrain_exactly(net)
    assert net.largest_singular_value() <= COEFFICIENT + 1e-6
    norms = [dense_norm(layer, layer.input_size) for layer in constrained_layers(net)]
    assert max(norms) == pytest.approx(net.largest_singular_value())
    assert norms == pytest.approx([COEFFICIENT] * 9, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fold_changes_nothing_but_the_classes(dtype: torch.dtype) -> None:
    net = network().to(dtype)
    constrain_exactly(net)
    x = torch.rand(3, 1, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before: Tensor = net(x)
    norm = net.largest_singular_value()
    names = [name for name, _ in net.named_parameters()]
    assert list(net.buffers())
    fold(net)
    assert torch.equal(net(x), before)
    assert net.largest_singular_value() == norm
    assert not constrained_layers(net)
    assert not list(net.buffers())
    assert [name for name, _ in net.named_parameters()] == names
    torch.testing.assert_close(
        net.inverse(before), x, rtol=0.0, atol=1e-4 if dtype == torch.float32 else 1e-5
    )


def test_fold_puts_batch_normalisation_into_the_convolution_before_it() -> None:
    torch.manual_seed(0)
    sequence = nn.Sequential(
        nn.BatchNorm2d(2),  # nothing before it to fold into
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 1),
        nn.BatchNorm2d(2),
    )
    module = nn.ModuleDict({"inside": sequence}).double()
    x = torch.randn(64, 2, 5, 4, dtype=torch.float64)
    for _ in range(3):
        sequence(2 * x + 1)  # statistics that are neither 0 nor 1
    module.eval()
    before = sequence(x)
    fold(module)
    folded = module["inside"]
    assert isinstance(folded, nn.Sequential)
    assert [type(layer) for layer in folded] == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.Conv2d]
    torch.testing.assert_close(folded(x), before, rtol=0.0, atol=1e-12)
