"""Heads: from a latent to logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.layers import ActNorm

LARGEST_FLAT = 16384
"""Latents with more elements (224-pixel images) are averaged over the image before a linear layer,
which would otherwise outgrow the network."""


def is_pooled(latent_shape: tuple[int, int, int]) -> bool:
    """Tell whether a head averages latents of this shape over the image."""
    channels, height, width = latent_shape
    return channels * height * width > LARGEST_FLAT


def linear_inputs(latent_shape: tuple[int, int, int], pooled: bool) -> int:
    """Return how many features of a latent a linear layer sees."""
    channels, height, width = latent_shape
    return channels if pooled else channels * height * width


class Head(nn.Module):
    """g: normalise, ELU, and a linear layer over the whole latent, or two with `hidden`.

    i-ResNet's classifier averages over the image before its linear layer; with branches that
    contract, that leaves the network far too little room in few epochs (MNIST: 90.9 % after four,
    where the whole latent has 95.3 % after one).

    Args:
        latent_shape: (C, H, W) of the latent.
        classes: number of classes.
        hidden: width of a hidden layer (0: none).
        channels: of a 3×3 convolution in front, whose output is averaged over the image (0: none).
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        classes: int,
        *,
        hidden: int = 0,
        channels: int = 0,
    ) -> None:
        super().__init__()
        self.pooled = bool(channels) or is_pooled(latent_shape)
        self.norm = ActNorm(latent_shape[0])
        self.conv = nn.Conv2d(latent_shape[0], channels, 3, padding=1) if channels else None
        inputs = channels or linear_inputs(latent_shape, self.pooled)
        self.hidden = (
            nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU())
            if hidden
            else nn.Identity()
        )
        self.linear = nn.Linear(hidden or inputs, classes)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents z (B, C, H, W) to logits (B, classes)."""
        features = F.elu(self.norm(z))
        if self.conv is not None:
            features = F.gelu(self.conv(features))
        flat = features.mean(dim=(2, 3)) if self.pooled else features.flatten(1)
        logits: Tensor = self.linear(self.hidden(flat))
        return logits
