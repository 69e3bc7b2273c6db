"""A convolution that is safe to train on every processor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NARROW = 16
"""oneDNN's block of input channels in 1×1 convolutions with AVX-512; with AVX2 it is half."""


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve images (B, C, H, W), as `torch.nn.functional.conv2d` does.

    A strided 1×1 convolution of fewer channels than a block subsamples the image first. In the
    channels-last format oneDNN computes the gradient of its weights wrong, or ends the process: it
    writes past the end of a buffer (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    pointwise = weight.shape[2:] == (1, 1) and padding == (0, 0)
    if pointwise and stride != (1, 1) and weight.shape[1] < NARROW:
        x, stride = F.avg_pool2d(x, 1, stride), (1, 1)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
