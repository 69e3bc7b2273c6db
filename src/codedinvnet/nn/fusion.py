"""Fusion encoders: from the images of a coding group to the image of its parity query.

Every encoder treats the images alike, and one network serves every group size. The images meet in
averages, so that the parity does not depend on their order; only the mosaic keeps them apart, each
in a cell of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.layers import space_to_depth


class Encoding(NamedTuple):
    """What a fusion encoder makes of a batch of groups.

    Attributes:
        parity: (B, C, H, W), the images of the parity queries.
        side: (B, m, S), one side-feature vector per member; S may be 0.
    """

    parity: Tensor
    side: Tensor


def group_mean(values: Tensor) -> Tensor:
    """Average values (B, m, ...) over the members."""
    weights = values.new_full(values.shape[:2], 1.0 / values.shape[1])
    return torch.einsum("bm,bm...->b...", weights, values)


class FusionEncoder(nn.Module, ABC):
    """E(x): the image whose latent should be the mean of the members' latents f(x_i)."""

    side_features: int = 0
    keeps_apart: bool = False
    """Whether the parity's latent holds the members side by side, not their mean."""

    @abstractmethod
    def forward(self, x: Tensor) -> Encoding:
        """Encode groups x (B, m, C, H, W)."""


class PixelMean(FusionEncoder):
    """The average image: no encoder at all, the baseline that shows what E is for."""

    def forward(self, x: Tensor) -> Encoding:
        return Encoding(group_mean(x), x.new_zeros(*x.shape[:2], 0))


def _stage(before: int, width: int, stride: int = 1) -> nn.Sequential:
    """Return a 3×3 convolution with normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class _Stages(nn.Module):
    """Three stages that see an image at 1/2, 1/4 and 1/8 of its size, unshuffled to the first.

    Normalisation is by batch statistics while it trains and folded into the convolutions before it
    is served.

    Args:
        channels: image channels.
        width: channels of the first stage (the next have 2 and 4 times as many).
        depth: further convolutions at 1/4 and at 1/8 of the size, each added to its input.
    """

    def __init__(self, channels: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.down1 = _stage(4 * channels, width)
        self.down2 = _stage(width, 2 * width, 2)
        self.more2 = nn.ModuleList(_stage(2 * width, 2 * width) for _ in range(depth))
        self.down3 = _stage(2 * width, 4 * width, 2)
        self.more3 = nn.ModuleList(_stage(4 * width, 4 * width) for _ in range(depth))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map unshuffled images (N, 4C, H/2, W/2) to the three stages' maps."""
        h1 = self.down1(x)
        h2 = self.down2(h1)
        for layer in self.more2:
            h2 = h2 + layer(h2)
        h3 = self.down3(h2)
        for layer in self.more3:
            h3 = h3 + layer(h3)
        return h1, h2, h3


class _SharedStages(_Stages, FusionEncoder):
    """What the small encoders have in common: the stages, shared by the members, and side features.

    Side features are a linear map of the last stage, pooled; they cost next to nothing.

    Args:
        channels: image channels.
        width: channels of the first stage.
        side_features: length of the side vector of a member (0: none).
        depth: further convolutions in the second and the third stage.
    """

    def __init__(
        self, channels: int, *, width: int = 16, side_features: int = 0, depth: int = 0
    ) -> None:
        super().__init__(channels, width=width, depth=depth)
        self.side_features = side_features
        self.to_side = nn.Linear(16 * width, side_features) if side_features else None

    def side(self, h3: Tensor, batch: int, members: int) -> Tensor:
        """Map the last stage's maps (B·m, 4·width, h, w) to side features (B, m, S)."""
        if self.to_side is None:
            return h3.new_zeros(batch, members, 0)
        pooled = F.adaptive_avg_pool2d(h3, 2).flatten(1)
        side: Tensor = self.to_side(pooled).unflatten(0, (batch, members))
        return side


class LeanFusion(_SharedStages):
    """A small encoder: shared convolution stages, averaged, and a decoder of equal size.

    Each stage's maps are averaged over the group, and a decoder with these averages as skips makes
    a correction to the average image.
    """

    def __init__(
        self, channels: int, *, width: int = 16, side_features: int = 0, depth: int = 0
    ) -> None:
        super().__init__(channels, width=width, side_features=side_features, depth=depth)
        self.bottom = nn.Conv2d(4 * width, 4 * width, 3, padding=1)
        self.up2 = nn.Conv2d(4 * width, 8 * width, 1)
        self.merge2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up1 = nn.Conv2d(2 * width, 4 * width, 1)
        self.merge1 = nn.Conv2d(2 * width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.merge1.weight)
        assert self.merge1.bias is not None
        nn.init.zeros_(self.merge1.bias)

    def forward(self, x: Tensor) -> Encoding:
        batch, members = x.shape[:2]
        h1, h2, h3 = self.stages(space_to_depth(x.flatten(0, 1), 2))

        def mean(h: Tensor) -> Tensor:
            return group_mean(h.unflatten(0, (batch, members)))

        d = F.relu(self.bottom(mean(h3)))
        d = F.pixel_shuffle(self.up2(d), 2)
        d = F.relu(self.merge2(torch.cat([d, mean(h2)], dim=1)))
        d = F.pixel_shuffle(self.up1(d), 2)
        d = self.merge1(torch.cat([d, mean(h1)], dim=1))
        parity = group_mean(x) + F.pixel_shuffle(d, 2)
        return Encoding(parity, self.side(h3, batch, members))


GRIDS = ((1, 2), (2, 2), (2, 4), (4, 4))
"""Rows and columns of a mosaic, the smallest first."""
FEW = 4
"""Members of a group whose encoder may take longer for each."""


def mosaic_grid(members: int) -> tuple[int, int]:
    """Return the rows and columns of the smallest mosaic with a cell for each member.

    Raises:
        ValueError: if there are more members than cells in the largest.
    """
    for rows, columns in GRIDS:
        if members <= rows * columns:
            return rows, columns
    raise ValueError(f"a mosaic has at most {rows * columns} cells, got {members} members")


class MosaicFusion(_SharedStages):
    """An encoder that keeps the members apart: each becomes a small picture in its own cell.

    Member i's cell of the parity image is a linear map of its pixels and its three stages' maps,
    all brought to the cell's size, with weights of their own for each of the four grids. f, which
    is made of convolutions, then works on all cells at once, and `MosaicHead` reads member i's cell
    of the latent. There is no sum to subtract the others from, so no error is amplified by the
    group's size, and one parity makes up for any number of members (docs/decisions/25-mosaic.md).

    A fresh one draws thumbnails.

    Args:
        channels: image channels.
        width: channels of the first stage (the next have 2 and 4 times as many).
        side_features: length of the side vector of a member (0: none).
        depth: further convolutions at 1/4 and at 1/8 of the size, each added to its input.
        more_for_few: whether members of groups of up to 4, of which there are few to encode, go
            through four further stages behind the second, which add to their side features, and,
            without a `cell_width`, draw the cells, too.
        few_width: width of these stages, 4 and 6 times as many channels; 0: as `width`.
        cell_width: channels of the first of three stages that draw the cells alone, as deep as the
            others, which are left to the side features; 0: the same stages do both.
    """

    keeps_apart = True

    def __init__(
        self,
        channels: int,
        *,
        width: int = 16,
        side_features: int = 0,
        depth: int = 0,
        more_for_few: bool = False,
        few_width: int = 0,
        cell_width: int = 0,
    ) -> None:
        super().__init__(channels, width=width, side_features=side_features, depth=depth)
        squeezed, drawn, few = 4 * channels, cell_width or width, few_width or width
        self.drawing = _Stages(channels, width=cell_width, depth=depth) if cell_width else None
        self.few = (
            nn.ModuleList(
                [
                    _stage(2 * width, 4 * few),
                    _stage(4 * few, 4 * few),
                    _stage(4 * few, 6 * few, 2),
                    _stage(6 * few, 6 * few),
                ]
            )
            if more_for_few
            else None
        )
        self.few_to_side = (
            nn.Linear(24 * few, side_features) if more_for_few and side_features else None
        )
        self.fine = nn.ModuleDict()
        self.coarse = nn.ModuleDict()
        for grid in GRIDS:
            extended = more_for_few and grid[0] * grid[1] <= FEW and not cell_width
            fine = nn.Conv2d(squeezed + drawn, squeezed, grid, grid)
            maps = 6 * drawn + (6 * few if extended else 0)
            coarse = nn.Conv2d(maps, squeezed, 1, bias=False)
            with torch.no_grad():
                fine.weight[:, :squeezed] = _thumbnail(channels, grid)
                nn.init.zeros_(fine.weight[:, squeezed:])
                coarse.weight.mul_(0.1)
            self.fine[_key(grid)] = fine
            self.coarse[_key(grid)] = coarse
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Encoding:
        batch, members = x.shape[:2]
        squeezed = space_to_depth(x.flatten(0, 1), 2)
        h1, *maps = self.stages(squeezed)
        side = self.side(maps[-1], batch, members)
        if self.few is not None and members <= FEW:
            maps.append(self._more(maps[0]))
            if self.few_to_side is not None:
                pooled = F.adaptive_avg_pool2d(maps[-1], 2).flatten(1)
                side = side + self.few_to_side(pooled).unflatten(0, (batch, members))
        if self.drawing is not None:
            h1, *maps = self.drawing.stages(squeezed)
        rows, columns = grid = mosaic_grid(members)
        tiles = self.fine[_key(grid)](torch.cat([squeezed, h1], dim=1))
        height, width = tiles.shape[2:]
        coarse = [F.adaptive_avg_pool2d(h, (height, width)) for h in maps]
        tiles = tiles + self.coarse[_key(grid)](torch.cat(coarse, dim=1))
        tiles = tiles.unflatten(0, (batch, members))
        cells = F.pad(tiles, (0,) * 7 + (rows * columns - members,))
        canvas = cells.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
        canvas = canvas.reshape(batch, tiles.shape[2], rows * height, columns * width)
        return Encoding(F.pixel_shuffle(canvas, 2), side)

    def _more(self, h: Tensor) -> Tensor:
        """Map the second stage's maps to those of the stages for few members."""
        assert self.few is not None
        for layer in self.few:
            after = layer(h)
            h = h + after if after.shape == h.shape else after
        return h


def _key(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _thumbnail(channels: int, grid: tuple[int, int]) -> Tensor:
    """Return the kernel that averages unshuffled images down to a cell of the grid."""
    rows, columns = grid
    kernel = torch.zeros(4 * channels, 4 * channels, rows, columns)
    for y in range(2 * rows):
        for x in range(2 * columns):
            source, target = 2 * (y % 2) + x % 2, 2 * (y // rows) + x // columns
            for channel in range(channels):
                kernel[4 * channel + target, 4 * channel + source, y // 2, x // 2] = 1.0
    return kernel / (rows * columns)


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

    def forward(self, x: Tensor) -> Encoding:
        batch, members = x.shape[:2]
        h = x.flatten(0, 1)
        averages: list[Tensor] = []
        for down in self.downs:
            h = down(h)
            averages.append(group_mean(h.unflatten(0, (batch, members))))
        d = self.ups[-1](averages[-1])
        for up, skip in zip(reversed(self.ups[:-1]), reversed(averages[:-1]), strict=True):
            d = up(torch.cat([skip, d], dim=1))
        return Encoding(d, x.new_zeros(batch, members, 0))


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
