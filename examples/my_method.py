"""A method of one's own: two weighted parities around any classifier, and nothing trained.

If the classifier were linear, its scores of a weighted mean of images would be the same mean of
their scores. Missing scores are those that fit the parities' best.

    codedinvnet bench accuracy --method examples/my_method.py:TwoParities
    codedinvnet serve mnist --k 4 --method examples/my_method.py:TwoParities
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import codedinvnet as ci


def weights(size: int) -> Tensor:
    """Return the members' weights in the two parities, (2, size): equal ones, and rising ones."""
    rising = torch.arange(1.0, size + 1, dtype=torch.float64)
    return torch.stack([torch.full_like(rising, 1 / size), rising / rising.sum()])


class TwoParities(ci.Method):
    """Any two missing members are solved for; of one alone, both parities are heard."""

    name = "two-parities"
    parities = 2

    def encode(self, parity: int, images: Tensor) -> Tensor:
        """Return a weighted mean (B, C, H, W) of the members (B, m, C, H, W)."""
        return torch.einsum("m,bm...->b...", weights(images.shape[1])[parity].to(images), images)

    def decode(
        self, member: int, answers: Mapping[int, Tensor], parities: Mapping[int, Tensor], size: int
    ) -> Tensor:
        """Return the scores (B, classes) of a missing member, by least squares."""
        missing = [i for i in range(size) if i not in answers]
        rows = weights(size)[[*parities]].to(next(iter(parities.values())))
        left = torch.stack([*parities.values()])
        for i, scores in answers.items():
            left = left - rows[:, i, None, None] * scores
        solution = torch.linalg.pinv(rows[:, missing])[missing.index(member)]
        return torch.einsum("p,pbc->bc", solution, left)
