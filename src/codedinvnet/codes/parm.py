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

from codedinvnet.codes.base import Encoded, Scheme, ScoresCode
from codedinvnet.codes.method import ONE, Batch, Given, Method, Tolerance
from codedinvnet.codes.rules import PARITY_MODEL, CodeRules, Parities
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import prepare


class SumCode(ScoresCode):
    """The parity model sees the average image; its output is the sum of the members' logits.

    Addition as the encoder and subtraction as the decoder (SOSP'19, section 3.2). The sum of the
    images is divided by k, which the first layer of a parity model could do as well. Groups have
    exactly k members, since the parity model was trained on averages of k.
    """

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return the parity images of groups (B, k, C, H, W)."""
        return Encoded(prepare(queries, 0).mean(dim=1))

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        others = [outputs[i] for i in range(size) if i != member]
        return outputs[self.rules.k] - torch.stack(others).sum(dim=0)


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
    rank = 6
    part = "parity"

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return Parities(k, fixed_size=True, model=PARITY_MODEL)

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        return ParityModel(copy.deepcopy(given.classifier).requires_grad_(True), given.k)

    def loss(self, part: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """The mean square of the difference from the sum of the logits (SOSP'19, section 3.3)."""
        return F.mse_loss(part(batch.images.mean(dim=1)), batch.logits.sum(dim=1))

    def build(self, given: Given) -> Scheme:
        assert given.part is not None
        return self.scheme(SumCode(self.rules(given.k)), given, **{PARITY_MODEL: given.part})
