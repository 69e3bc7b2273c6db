from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.nn import activation
from codedinvnet.nn.activation import elu, elu_

SHAPES = [(1, 3, 4, 5), (7, 16, 16, 16), (40, 32, 16, 16)]
"""Below the smallest, in one piece, in several."""


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 90.0, -90.0], dtype=dtype)
    x.view(-1)[: len(special)] = special
    return x


def test_shapes_take_every_path() -> None:
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    assert sizes[0] < activation.SMALLEST < sizes[1] < activation.PIECE < sizes[2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_elu_is_elu(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = values(shape, dtype).contiguous(memory_format=layout)
    before, expected = x.clone(), F.elu(x)
    atol = 2 * torch.finfo(dtype).eps
    found = elu(x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)
    assert found.stride() == x.stride()
    assert torch.equal(x, before)
    assert elu_(x) is x
    torch.testing.assert_close(x, expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_elu_passes_nan_and_infinity_on(shape: tuple[int, ...]) -> None:
    x = values(shape)
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for found in (elu(x), elu_(x.clone())):
        assert found[0, 0, 0, 0].isnan()
        assert found[0, 0, 0, 1:3].tolist() == [torch.inf, -1.0]
        assert int(found.isnan().sum()) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_plain_function(shape: tuple[int, ...]) -> None:
    x = values(shape, torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(F.elu(x).square().sum(), x)
    for act in (elu, elu_):
        (found,) = torch.autograd.grad(act(x * 1.0).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "SMALLEST", 0)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for act in (elu, elu_):
        assert torch.autograd.gradgradcheck(lambda v, act=act: act(v * 1.0), (x.requires_grad_(),))
