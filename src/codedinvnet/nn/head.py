"""Heads: from a latent to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.layers import ActNorm


class Head(nn.Module):
    """g: normalise, ELU, one linear layer over the whole latent.

    i-ResNet's classifier averages over the image before its linear layer; with branches that
    contract, that leaves the network far too little room in few epochs (docs/decisions.md).

    Args:
        latent_shape: (C, H, W) of the latent.
        classes: number of classes.
    """

    def __init__(self, latent_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = latent_shape
        self.norm = ActNorm(channels)
        self.linear = nn.Linear(channels * height * width, classes)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents z (B, C, H, W) to logits (B, classes)."""
        logits: Tensor = self.linear(F.elu(self.norm(z)).flatten(1))
        return logits


class RecoveryHead(nn.Module):
    """g': logits of a *decoded* latent, and of what the parity worker knows of that member.

    A decoded latent carries the whole group's fusion error, so it is classified by a network of
    its own: two linear layers over the normalised latent and the member's side features.

    Args:
        latent_shape: (C, H, W) of the latent.
        classes: number of classes.
        hidden: width of the hidden layer.
        side_features: length of the side vector (0: none).
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        classes: int,
        *,
        hidden: int = 256,
        side_features: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        self.side_features = side_features
        self.norm = ActNorm(channels)
        self.expand = nn.Linear(channels * height * width + side_features, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden + side_features, classes)

    def forward(self, z: Tensor, side: Tensor) -> Tensor:
        """Map decoded latents z (B, C, H, W) and side features (B, side) to logits (B, classes)."""
        flat = torch.cat([self.norm(z).flatten(1), side], dim=1)
        h = F.gelu(self.hidden_norm(self.expand(flat)))
        logits: Tensor = self.classify(torch.cat([h, side], dim=1))
        return logits
