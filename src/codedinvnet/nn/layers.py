"""Small invertible layers, squeeze and activation normalisation, and networks in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.transform import InvertibleTransform, TransformSequence


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """Make channels of every `factor`×`factor` block of pixels (..., C, H, W), if any images.

    PyTorch's own leaves an empty batch in the shape that it has.
    """
    if x.numel():
        return F.pixel_unshuffle(x, factor)
    *lead, channels, height, width = x.shape
    return x.new_empty(*lead, channels * factor**2, height // factor, width // factor)


class Squeeze(InvertibleTransform):
    """Space to depth: every `factor`×`factor` block of pixels becomes channels."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return space_to_depth(x, self.factor)

    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        return F.pixel_shuffle(z, self.factor)

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape (C', H', W') that an input of shape (C, H, W) is mapped to."""
        channels, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"a squeeze by {self.factor} cannot divide an image of {height}x{width} pixels"
            )
        return channels * self.factor**2, height // self.factor, width // self.factor


class ActNorm(InvertibleTransform):
    """A scale and a shift per channel (Kingma & Dhariwal, Glow, NeurIPS 2018).

    `initialise` sets both from one batch so that the output has mean 0 and variance 1 per channel;
    training goes on from there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Normalise the channels of x (B, C, H, W)."""
        values = x.transpose(0, 1).flatten(1)
        # A channel that never varies (a corner of the border) must not be blown up.
        scale = 1.0 / values.std(dim=1).clamp_min(0.05)
        self.log_scale.copy_(scale.log())
        self.shift.copy_(-values.mean(dim=1) * scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.log_scale.exp().view(-1, 1, 1)
        return torch.addcmul(self.shift.view(-1, 1, 1), x, scale)

    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        return (z - self.shift[:, None, None]) * (-self.log_scale).exp()[:, None, None]


class StagedNetwork(TransformSequence):
    """A squeeze, then stages of blocks, some of which begin with another squeeze.

    Args:
        input_shape: (C, H, W).
        block: returns the transforms of a block for inputs (C, H, W), of so many hidden channels;
            the network's first one, which sees pixels, is told so.
        blocks: blocks per stage.
        strides: 1, or 2 for a squeeze in front of the stage.
        hidden: hidden channels per stage.
        initial_squeeze: factor of the first squeeze (1: none).

    Raises:
        ValueError: if a squeeze cannot divide the image, or a block does not fit.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        block: Callable[[tuple[int, int, int], int, bool], Iterable[InvertibleTransform]],
        *,
        blocks: Sequence[int],
        strides: Sequence[int],
        hidden: Sequence[int],
        initial_squeeze: int,
    ) -> None:
        transforms: list[InvertibleTransform] = []
        shape, first = input_shape, True

        def squeeze(factor: int) -> None:
            nonlocal shape
            if factor > 1:
                transforms.append(layer := Squeeze(factor))
                shape = layer.output_shape(shape)

        squeeze(initial_squeeze)
        for count, stride, width in zip(blocks, strides, hidden, strict=True):
            squeeze(stride)
            for _ in range(count):
                transforms.extend(block(shape, width, first))
                first = False
        super().__init__(transforms)
        self.input_shape, self.latent_shape = input_shape, shape
