"""Fusion encoders: from the images of a coding group to the image of its parity query.

Every encoder treats the images alike, and one network serves every group size. The images meet in
averages, so that the parity does not depend on their order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.layers import space_to_depth


def group_mean(values: Tensor) -> Tensor:
    """Average values (B, m, ...) over the members."""
    weights = values.new_full(values.shape[:2], 1.0 / values.shape[1])
    return torch.einsum("bm,bm...->b...", weights, values)


class FusionEncoder(nn.Module, ABC):
    """E(x): the image whose latent should be the mean of the members' latents f(x_i)."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map groups x (B, m, C, H, W) to the images (B, C, H, W) of their parity queries."""


class PixelMean(FusionEncoder):
    """The average image: no encoder at all, the baseline that shows what E is for."""

    def forward(self, x: Tensor) -> Tensor:
        return group_mean(x)


def _stage(before: int, width: int, stride: int = 1) -> nn.Sequential:
    """Return a 3×3 convolution with normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class LeanFusion(FusionEncoder):
    """A small encoder: convolution stages, averaged over the group, and a decoder of equal size.

    Three stages, shared by the members, see an image at 1/2, 1/4 and 1/8 of its size, unshuffled
    to the first. A decoder with the averages of their maps as skips makes a correction to the
    average image. Normalisation is by batch statistics while it trains and folded into the
    convolutions before it is served.

    Args:
        channels: image channels.
        width: channels of the first stage (the next have 2 and 4 times as many).
        depth: further convolutions at 1/4 and at 1/8 of the size, each added to its input.
    """

    def __init__(self, channels: int, *, width: int = 16, depth: int = 0) -> None:
        super().__init__()
        self.down1 = _stage(4 * channels, width)
        self.down2 = _stage(width, 2 * width, 2)
        self.more2 = nn.ModuleList(_stage(2 * width, 2 * width) for _ in range(depth))
        self.down3 = _stage(2 * width, 4 * width, 2)
        self.more3 = nn.ModuleList(_stage(4 * width, 4 * width) for _ in range(depth))
        self.bottom = nn.Conv2d(4 * width, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(4 * width, 8 * width, 1)
        self.merge2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up1 = nn.Conv2d(2 * width, 4 * width, 1)
        self.merge1 = nn.Conv2d(2 * width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.merge1.weight)
        assert self.merge1.bias is not None
        nn.init.zeros_(self.merge1.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, members = x.shape[:2]
        h1 = self.down1(space_to_depth(x.flatten(0, 1), 2))
        h2 = self.down2(h1)
        for layer in self.more2:
            h2 = h2 + layer(h2)
        h3 = self.down3(h2)
        for layer in self.more3:
            h3 = h3 + layer(h3)

        def mean(h: Tensor) -> Tensor:
            return group_mean(h.unflatten(0, (batch, members)))

        d = F.relu(self.bottom(mean(h3)))
        d = F.pixel_shuffle(self.up2(d), 2)
        d = F.relu(self.merge2(torch.cat([d, mean(h2)], dim=1)))
        d = F.pixel_shuffle(self.up1(d), 2)
        d = self.merge1(torch.cat([d, mean(h1)], dim=1))
        return group_mean(x) + F.pixel_shuffle(d, 2)


class UNetFusion(FusionEncoder):
    """The paper's encoder: pix2pix's U-Net with shared, averaged encoders (section 3.3).

    The down path is shared by the images; skips and bottleneck are averaged over them. As in the
    published code skips are averaged behind the activation, there is no final activation, and the
    innermost kernels are 2×2.

    Args:
        channels: image channels.
        filters: channels after the first convolution (the paper: 64).
        depth: number of levels, of which all but the innermost halve the image (32 pixels: 5).
    """

    def __init__(self, channels: int, *, filters: int = 64, depth: int = 5) -> None:
        super().__init__()
        widths = [filters * min(2**i, 8) for i in range(depth)]
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        before = channels
        for level, width in enumerate(widths):
            outer, inner = level == 0, level == depth - 1
            kernel = 2 if inner else 4
            down: list[nn.Module] = [nn.Conv2d(before, width, kernel, 2, 1, bias=False)]
            if not outer and not inner:
                down.append(nn.BatchNorm2d(width))
            if not inner:  # behind which skips begin: in the published code it works in place
                down.append(nn.LeakyReLU(0.2))
            self.downs.append(nn.Sequential(*down))
            up: list[nn.Module] = [
                nn.PReLU(),
                nn.ConvTranspose2d(width if inner else 2 * width, before, kernel, 2, 1, bias=outer),
            ]
            if not outer:
                up.append(nn.BatchNorm2d(before))
            if 4 <= level < depth - 1:  # as in pix2pix
                up.append(nn.Dropout(0.5))
            self.ups.append(nn.Sequential(*up))
            before = width
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        batch, members = x.shape[:2]
        h = x.flatten(0, 1)
        averages: list[Tensor] = []
        for down in self.downs:
            h = down(h)
            averages.append(group_mean(h.unflatten(0, (batch, members))))
        d: Tensor = self.ups[-1](averages[-1])
        for up, skip in zip(reversed(self.ups[:-1]), reversed(averages[:-1]), strict=True):
            d = up(torch.cat([skip, d], dim=1))
        return d


class PatchDiscriminator(nn.Module):
    """PatchGAN on the k images of a group and a parity image, stacked as channels.

    Unlike the encoder it depends on the order and the number of images, as in the published code;
    it is used in training alone.

    Args:
        channels: channels of one image.
        members: k.
        filters: channels after the first convolution.
        layers: halvings.
    """

    def __init__(self, channels: int, members: int, *, filters: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [
            nn.Conv2d(channels * (members + 1), filters, 4, 2, 1),
            nn.LeakyReLU(0.2),
        ]
        width = filters
        for level in range(1, layers + 1):
            after = filters * min(2**level, 8)
            stride = 2 if level < layers else 1
            modules += [
                nn.Conv2d(width, after, 4, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
            width = after
        modules.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.model = nn.Sequential(*modules)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, parity: Tensor) -> Tensor:
        """Score groups x (B, k, C, H, W) with parities (B, C, H, W), as (B, 1, h, w)."""
        score: Tensor = self.model(torch.cat([x.flatten(1, 2), parity], dim=1))
        return score
