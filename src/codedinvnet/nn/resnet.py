"""Plain residual networks: a classifier, and an f that has no inverse.

He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, with basic blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.convolution import conv2d
from codedinvnet.nn.layers import Squeeze, space_to_depth

WIDEST = 2**16
"""A search for a width ends here."""


class Shortcut(nn.Conv2d):
    """A 1×1 convolution, maybe with a stride, without a bias."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__(before, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, H, W) to (B, channels, H / stride, W / stride)."""
        return conv2d(x, self.weight, stride=self.stride)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and a shortcut."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != channels:
            self.shortcut = nn.Sequential(
                Shortcut(before, channels, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, H, W) to (B, channels, H / stride, W / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        out: Tensor = F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """Stages of basic blocks, each of twice the channels and half the size of the one before.

    Args:
        channels: image channels.
        classes: number of classes.
        width: channels of the first stage (ResNet-18: 64).
        blocks: blocks per stage (ResNet-18: 2, 2, 2, 2).
        squeeze: factor by which pixels become channels first; 2 makes a small network cheaper.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        width: int,
        blocks: Sequence[int] = (2, 2, 2, 2),
        squeeze: int = 1,
    ) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.stem = nn.Conv2d(channels * squeeze**2, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        before = width
        for stage, count in enumerate(blocks):
            after = width * 2**stage
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                stages.append(BasicBlock(before, after, stride))
                before = after
        self.stages = nn.Sequential(*stages)
        self.features = before
        self.classify: nn.Module = nn.Linear(before, classes)

    def maps(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the last stage's maps."""
        h = space_to_depth(x, self.squeeze) if self.squeeze > 1 else x
        found: Tensor = self.stages(F.relu(self.norm(self.stem(h))))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes)."""
        logits: Tensor = self.classify(self.maps(x).mean(dim=(2, 3)))
        return logits


class PlainNetwork(nn.Module):
    """An f without an inverse: a squeeze and stages of basic blocks; the last maps are the latent.

    Decoding subtracts latents and never inverts f, so this is the control that tells what
    invertibility costs.

    Args:
        input_shape: (C, H, W).
        blocks: blocks per stage.
        strides: of each stage's first block, 1 or 2.
        hidden: channels per stage.
        initial_squeeze: factor by which pixels become channels first (1: none).

    Raises:
        ValueError: if a squeeze or a stride cannot divide the image.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        *,
        blocks: Sequence[int],
        strides: Sequence[int],
        hidden: Sequence[int],
        initial_squeeze: int = 2,
    ) -> None:
        super().__init__()
        channels, height, width = Squeeze(initial_squeeze).output_shape(input_shape)
        stride = math.prod(strides)
        if height % stride or width % stride:
            raise ValueError(f"strides of {stride} in all cannot divide maps of {height}x{width}")
        layers: list[nn.Module] = [Squeeze(initial_squeeze)]
        for count, first, after in zip(blocks, strides, hidden, strict=True):
            for number in range(count):
                layers.append(BasicBlock(channels, after, 1 if number else first))
                channels = after
        self.layers = nn.ModuleList(layers)
        self.input_shape = input_shape
        self.latent_shape = channels, height // stride, width // stride

    def steps(self) -> list[nn.Module]:
        """Return the layers in forward order."""
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to latents (B, *latent_shape)."""
        for layer in self.layers:
            x = layer(x)
        return x


def width_of_cost(cost: Callable[[int], int], budget: int) -> int:
    """Return the largest width whose cost is within the budget; at least 1, at most WIDEST."""
    within, beyond = 1, 2
    while beyond <= WIDEST and cost(beyond) <= budget:
        within, beyond = beyond, 2 * beyond
    beyond = min(beyond, WIDEST + 1)
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if cost(middle) <= budget:
            within = middle
        else:
            beyond = middle
    return within
