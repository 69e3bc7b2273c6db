"""ParM: a parity *model* whose output stands for the whole group.

Kosaian, Rashmi & Venkataraman, *Parity Models: Erasure-Coded Resilience for Prediction Serving
Systems*, SOSP 2019.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.method import Batch, Given, Method


class ParityModel(nn.Module):
    """A classifier whose output is taken k-fold.

    A copy of the served classifier in this place begins near the sum it shall learn: on the
    average image it returns something like the average logits.

    Args:
        classifier: maps images (B, C, H, W) to logits (B, classes).
        k: members of a group.
    """

    def __init__(self, classifier: nn.Module, k: int) -> None:
        super().__init__()
        self.classifier, self.k = classifier, k

    def forward(self, images: Tensor) -> Tensor:
        """Map parity images (B, C, H, W) to sums of logits (B, classes)."""
        total: Tensor = self.k * self.classifier(images)
        return total


class ParM(Method):
    """A parity model, distilled from the classifier, on the average image."""

    name = "parm"
    part = "parity"

    def encode(self, parity: int, images: Tensor) -> Tensor:
        """Return the average image.

        Addition as the encoder and subtraction as the decoder (SOSP'19, section 3.2). The sum of
        the images is divided by k, which the first layer of a parity model could do as well.
        """
        return images.mean(dim=1)

    def decode(
        self, member: int, answers: Mapping[int, Tensor], parities: Mapping[int, Tensor], size: int
    ) -> Tensor:
        """Subtract the other members' scores from the sum that the parity model returned."""
        return parities[0] - torch.stack([*answers.values()]).sum(dim=0)

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        return ParityModel(copy.deepcopy(given.classifier).requires_grad_(True), given.k)

    def loss(self, part: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """The mean square of the difference from the sum of the logits (SOSP'19, section 3.3)."""
        return F.mse_loss(part(batch.images.mean(dim=1)), batch.logits.sum(dim=1))
