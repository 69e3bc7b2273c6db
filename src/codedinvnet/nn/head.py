"""Heads: from a latent to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.layers import ActNorm

LARGEST_FLAT = 16384
"""Latents with more elements (224-pixel images) are averaged over the image before a linear layer,
which would otherwise outgrow the network."""


def linear_inputs(latent_shape: tuple[int, int, int]) -> int:
    """Return how many features of a latent a linear layer sees."""
    channels, height, width = latent_shape
    size = channels * height * width
    return size if size <= LARGEST_FLAT else channels


def linear_features(z: Tensor) -> Tensor:
    """Flatten latents z (B, C, H, W), or average large ones over the image."""
    return z.flatten(1) if z[0].numel() <= LARGEST_FLAT else z.mean(dim=(2, 3))


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
        self.norm = ActNorm(latent_shape[0])
        self.linear = nn.Linear(linear_inputs(latent_shape), classes)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents z (B, C, H, W) to logits (B, classes)."""
        logits: Tensor = self.linear(linear_features(F.elu(self.norm(z))))
        return logits


class RecoveryHead(nn.Module):
    """g': logits of a *decoded* latent, and of what the parity worker knows of that member.

    A decoded latent carries the whole group's fusion error, so it is classified by a network of
    its own: two linear layers over the normalised latent and the member's side features. Their
    logits are added to those of g on the same latent, times a trust a + b/m that is learned: in a
    small group the decoded latent is nearly the true one, and g knows best.

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
        self.side_features = side_features
        self.norm = ActNorm(latent_shape[0])
        self.expand = nn.Linear(linear_inputs(latent_shape) + side_features, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden + side_features, classes)
        self.trust = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, z: Tensor, side: Tensor, direct: Tensor, members: int) -> Tensor:
        """Classify decoded latents.

        Args:
            z: decoded latents, (B, C, H, W).
            side: the missing members' side features, (B, side).
            direct: the logits that g gives the decoded latents, (B, classes).
            members: m, the size of their groups.

        Returns:
            Logits (B, classes).
        """
        flat = torch.cat([linear_features(self.norm(z)), side], dim=1)
        h = F.gelu(self.hidden_norm(self.expand(flat)))
        logits: Tensor = self.classify(torch.cat([h, side], dim=1))
        return logits + (self.trust[0] + self.trust[1] / members) * direct
