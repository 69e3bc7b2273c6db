"""Convolutions of small maps, as products and as PyTorch has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from codedinvnet.nn.small_maps import SmallMapConv2d, SmallMapConvTranspose2d

WIDE = 64
SHAPES = [  # kernel, stride, padding, side: what the U-Net and the discriminator have, and others
    (4, 2, 1, 8),
    (4, 1, 1, 4),
    (2, 2, 1, 2),
    (3, 1, 1, 3),
    (3, 2, 0, 7),
]
TRANSPOSED = [(4, 2, 1, 2), (4, 2, 1, 4), (2, 2, 1, 2), (3, 1, 1, 3), (3, 2, 0, 3)]


def sparse(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Return few ones and minus ones: bfloat16 has their sums of products exactly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(shape, generator=generator)
    return (chosen > 0.95).float() - (chosen < 0.05).float()


def passes(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what a layer answers, and the gradients of it."""
    x = x.clone().requires_grad_(True)
    y = layer(x)
    slope = sparse(y.shape, 1).to(y.dtype)
    return [y.float(), *torch.autograd.grad(y, [x, *layer.parameters()], slope)]


def refuse(*_: object, **__: object) -> Tensor:
    raise AssertionError("PyTorch's convolution was asked")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "theirs", "shape"),
    [(SmallMapConv2d, nn.Conv2d, shape) for shape in SHAPES]
    + [(SmallMapConvTranspose2d, nn.ConvTranspose2d, shape) for shape in TRANSPOSED],
)
def test_products_answer_and_learn_as_the_convolution(
    kind: type[nn.Module],
    theirs: type[nn.Module],
    shape: tuple[int, int, int, int],
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, stride, padding, side = shape
    layers = [one(WIDE, WIDE + 1, kernel, stride, padding, bias=bias) for one in (kind, theirs)]
    for layer in layers:
        for number, parameter in enumerate(layer.parameters()):
            parameter.data = sparse(parameter.shape, 2 + number)
    x = sparse((3, WIDE, side, side + 1), 0)[..., :side]  # not contiguous
    expected = passes(layers[1], x)
    monkeypatch.setattr(nn.functional, "conv2d", refuse)
    monkeypatch.setattr(nn.functional, "conv_transpose2d", refuse)
    with torch.autocast("cpu", torch.bfloat16):
        found = passes(layers[0], x)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours.float(), wanted)
    assert expected[1].any()


class Asked(TorchDispatchMode):
    """Notes the names of the operators that are asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [SmallMapConv2d, SmallMapConvTranspose2d])
def test_the_kernel_is_not_copied_for_each_map(kind: type[nn.Module]) -> None:
    """A product of a batch does, and takes four times as long as all else."""
    layer, x = kind(WIDE, WIDE, 4, 2, 1), torch.ones(8, WIDE, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), Asked() as asked:
        passes(layer, x)
    assert "aten.mm.default" in asked.names
    assert "aten.bmm.default" not in asked.names


@pytest.mark.parametrize(
    ("channels", "side", "reduced"), [(WIDE, 8, False), (WIDE, 32, True), (8, 8, True)]
)
def test_elsewhere_they_are_the_convolution_itself(
    channels: int, side: int, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("conv2d", "conv_transpose2d"):
        theirs = getattr(nn.functional, name)

        def noted(*values: object, name: str = name, theirs: object = theirs) -> Tensor:
            asked.append(name)
            answer: Tensor = theirs(*values)  # type: ignore[operator]
            return answer

        monkeypatch.setattr(nn.functional, name, noted)
    x = torch.ones(1, channels, side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        SmallMapConv2d(channels, channels, 4, 2, 1)(x)
        SmallMapConvTranspose2d(channels, channels, 4, 2, 1)(x)
    assert asked == ["conv2d", "conv_transpose2d"]


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},
        {"dilation": 2},
        {"padding_mode": "circular"},
        {"kernel_size": 3, "padding": "same", "stride": 1},
        {"kernel_size": (4, 3)},
        {"stride": (2, 1)},
    ],
)
def test_what_products_do_not_do_is_left_to_the_convolution(options: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1, **options}
    x = sparse((2, WIDE, 8, 8), 0)
    layers = [kind(WIDE, WIDE, **shape) for kind in (SmallMapConv2d, nn.Conv2d)]
    layers[0].load_state_dict(layers[1].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (layer(x) for layer in layers)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("options", [{"groups": 4}, {"dilation": 2}, {"output_padding": 1}])
def test_nor_of_a_transposed_one(options: dict[str, Any]) -> None:
    x = sparse((2, WIDE, 4, 4), 0)
    kinds = (SmallMapConvTranspose2d, nn.ConvTranspose2d)
    layers = [kind(WIDE, WIDE, 4, 2, 1, **options) for kind in kinds]
    layers[0].load_state_dict(layers[1].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (layer(x) for layer in layers)
    assert torch.equal(found, wanted)
