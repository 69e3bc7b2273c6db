"""Heads: from a latent to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.fusion import mosaic_grid
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


class RecoveryHead(nn.Module):
    """g': logits of a *decoded* latent, and of what the parity worker knows of that member.

    A decoded latent carries the whole group's fusion error, so it is classified by a network of
    its own: two linear layers over the normalised latent and the member's side features. Their
    logits are added to those of g on the same latent, times a trust a + b/m that is learned: in a
    small group the decoded latent is nearly the true one, and g knows best.

    It is trained to answer from either kind of evidence alone, too (`from_latent`, `from_side`), so
    that what each is worth can be measured.

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
        self.pooled = is_pooled(latent_shape)
        self.norm = ActNorm(latent_shape[0])
        inputs = linear_inputs(latent_shape, self.pooled)
        self.expand = nn.Linear(inputs + side_features, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden + side_features, classes)
        self.trust = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, z: Tensor, side: Tensor, direct: Tensor, members: int) -> Tensor:
        """Classify decoded latents.

        Args:
            z: decoded latents, (B, C, H, W).
            side: the missing members' side features, (B, side).
            direct: the logits that g gives the decoded latents, (B, classes).
            members: m, the size of their groups, by which the parity's error has grown.

        Returns:
            Logits (B, classes).
        """
        features = self.norm(z)
        flat = F.elu(features).mean(dim=(2, 3)) if self.pooled else features.flatten(1)
        own = self._classified(flat, side)
        return own + (self.trust[0] + self.trust[1] / members) * direct

    def from_latent(self, z: Tensor, direct: Tensor, members: int) -> Tensor:
        """Classify decoded latents (B, C, H, W) without side features."""
        logits: Tensor = self(z, z.new_zeros(z.shape[0], self.side_features), direct, members)
        return logits

    def from_side(self, side: Tensor) -> Tensor:
        """Classify by side features (B, side) alone: a small classifier next to the big one."""
        inputs = self.expand.in_features - self.side_features
        return self._classified(side.new_zeros(side.shape[0], inputs), side)

    def _classified(self, features: Tensor, side: Tensor) -> Tensor:
        h = F.gelu(self.hidden_norm(self.expand(torch.cat([features, side], dim=1))))
        logits: Tensor = self.classify(torch.cat([h, side], dim=1))
        return logits


class MosaicHead(nn.Module):
    """g' for parities that keep their members apart (`MosaicFusion`).

    Each member's cell of the parity's latent is read: normalise, ELU, a 1×1 convolution,
    GELU, and the average over the cell. These readings and the member's side features are
    classified by two linear layers. It is trained to answer from either alone, too.

    Args:
        latent_shape: (C, H, W) of the latent.
        classes: number of classes.
        hidden: width of the hidden layer.
        side_features: length of the encoder's side vector (0: none).
        readings: length of what is read from a cell.
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        classes: int,
        *,
        hidden: int = 256,
        side_features: int = 0,
        readings: int = 128,
    ) -> None:
        super().__init__()
        self.side_features, self.readings = side_features, readings
        self.norm = ActNorm(latent_shape[0])
        self.reader = nn.Conv2d(latent_shape[0], readings, 1)
        self.expand = nn.Linear(side_features + readings, hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.classify = nn.Linear(hidden + side_features + readings, classes)

    def read(self, z: Tensor, members: int) -> Tensor:
        """Read the members' cells of parities' latents z (B, C, H, W), as (B, m, readings)."""
        maps = F.gelu(self.reader(F.elu(self.norm(z))))
        cells = F.adaptive_avg_pool2d(maps, mosaic_grid(members))
        return cells.flatten(2)[..., :members].transpose(1, 2)

    def forward(self, evidence: Tensor) -> Tensor:
        """Classify by side features, then readings: (B, S + readings) to (B, classes)."""
        h = F.gelu(self.hidden_norm(self.expand(evidence)))
        logits: Tensor = self.classify(torch.cat([h, evidence], dim=1))
        return logits

    def from_latent(self, evidence: Tensor) -> Tensor:
        """Classify by the readings of `evidence` alone."""
        logits: Tensor = self(F.pad(evidence[:, self.side_features :], (self.side_features, 0)))
        return logits

    def from_side(self, evidence: Tensor) -> Tensor:
        """Classify by the side features of `evidence` alone."""
        logits: Tensor = self(F.pad(evidence[:, : self.side_features], (0, self.readings)))
        return logits
