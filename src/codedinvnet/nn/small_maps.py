"""Convolutions of small maps as products of matrices, for training in bfloat16 on a processor.

PyTorch's library leaves a processor's matrix instructions nearly idle where a map has few pixels
and many channels, most of all in the backward pass. As products of matrices, a step of the paper's
U-Net and discriminator took half of the time. In float32 nothing was gained: there, and on other
devices, these layers are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SIDE = 4
"""Of the smaller map of a convolution. Those of 8 pixels took a third longer as products."""
FEWEST_CHANNELS = 64


def _patches(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Return what a convolution sees of maps (B, C, H, W): (B, h, w, kernel² C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    seen = padded.unfold(1, kernel, stride).unfold(2, kernel, stride)
    return seen.permute(0, 1, 2, 4, 5, 3).flatten(3)


def _add_patches(
    patches: Tensor, kernel: int, stride: int, padding: int, size: tuple[int, int]
) -> Tensor:
    """Add patches (B, h, w, kernel² C) up where they lie in maps (B, C, *size): the transpose."""
    batch, rows, columns = patches.shape[:3]
    parts = patches.unflatten(3, (kernel, kernel, -1))
    padded = [side + 2 * padding for side in size]
    maps = patches.new_zeros(batch, *padded, parts.shape[-1])
    for i in range(kernel):
        for j in range(kernel):
            maps[:, i : i + stride * rows : stride, j : j + stride * columns : stride] += parts[
                :, :, :, i, j
            ]
    inner = maps[:, padding : padding + size[0], padding : padding + size[1]]
    return inner.permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """Return a kernel (A, C, k, k) as (A, k² C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _product(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Return the products of pixels (B, h, w, n) and a matrix (n, m), as one of matrices.

    PyTorch would copy the matrix for each of the B maps where pixels do not lie one after another.
    """
    product: Tensor = (pixels.flatten(0, 2) @ matrix).unflatten(0, pixels.shape[:3])
    return product


def _kernel(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return a matrix (A, k² C) as the kernel (A, C, k, k) that it was."""
    return matrix.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


class _Convolve(torch.autograd.Function):
    """A convolution, its output's channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        patches = _patches(x, weight.shape[2], stride, padding)
        matrix = _matrix(weight)
        ctx.save_for_backward(patches, matrix)
        ctx.size, ctx.shape, ctx.options = x.shape[2:], weight.shape, (stride, padding)
        return _product(patches, matrix.T).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        patches, matrix = ctx.saved_tensors
        slope = gradients[0].permute(0, 2, 3, 1)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            stride, padding = ctx.options
            of_x = _add_patches(_product(slope, matrix), ctx.shape[2], stride, padding, ctx.size)
        if ctx.needs_input_grad[1]:
            product = slope.flatten(0, 2).T @ patches.flatten(0, 2)
            of_weight = _kernel(product, ctx.shape)
        return of_x, of_weight, None, None


class _ConvolveTransposed(torch.autograd.Function):
    """The transpose of a convolution: its forward pass is the other's backward one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        kernel = weight.shape[2]
        pixels, matrix = x.permute(0, 2, 3, 1), _matrix(weight)
        ctx.save_for_backward(pixels, matrix)
        ctx.shape, ctx.options = weight.shape, (stride, padding)
        rows, columns = ((side - 1) * stride - 2 * padding + kernel for side in x.shape[2:])
        return _add_patches(_product(pixels, matrix), kernel, stride, padding, (rows, columns))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pixels, matrix = ctx.saved_tensors
        slope = _patches(gradients[0], ctx.shape[2], *ctx.options)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _product(slope, matrix.T).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            product = pixels.flatten(0, 2).T @ slope.flatten(0, 2)
            of_weight = _kernel(product, ctx.shape)
        return of_x, of_weight, None, None


def _pays(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, side: int) -> bool:
    """Return whether a layer is one that products can compute, and faster."""
    pairs = (layer.kernel_size, layer.stride, layer.padding)
    plain = (layer.groups, layer.dilation, layer.output_padding) == (1, (1, 1), (0, 0))
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and side <= LARGEST_SIDE
        and min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS
        and plain
        and layer.padding_mode == "zeros"
        and all(pair[0] == pair[1] for pair in pairs)
    )


def _biased(maps: Tensor, bias: Tensor | None) -> Tensor:
    return maps if bias is None else maps + bias.to(maps.dtype)[:, None, None]


class SmallMapConv2d(nn.Conv2d):
    """PyTorch's convolution."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _), padding = self.kernel_size, self.stride, self.padding[0]
        if not isinstance(padding, int) or not _pays(
            self, x, (max(x.shape[2:]) + 2 * padding - kernel) // stride + 1
        ):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu")
        weight = self.weight.to(dtype)
        maps: Tensor = _Convolve.apply(x.to(dtype), weight, stride, padding)  # type: ignore[no-untyped-call]
        return _biased(maps, self.bias)


class SmallMapConvTranspose2d(nn.ConvTranspose2d):
    """PyTorch's transposed convolution."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or not _pays(self, x, max(x.shape[2:])):
            return super().forward(x, output_size)
        dtype = torch.get_autocast_dtype("cpu")
        weight = self.weight.to(dtype)
        options = self.stride[0], self.padding[0]
        maps: Tensor = _ConvolveTransposed.apply(x.to(dtype), weight, *options)  # type: ignore[no-untyped-call]
        return _biased(maps, self.bias)
