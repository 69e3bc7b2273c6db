"""A method of one's own: two weighted parities around any classifier, and nothing trained.

A parity is a weighted mean of the group's images. If the classifier were linear, its scores of a
parity would be the same mean of the members' scores. Missing scores are what fits that best.

    METHOD=examples/my_method.py:TwoParities
    codedinvnet bench accuracy GRID.json --method $METHOD
    codedinvnet serve mnist --k 4 --method $METHOD
    codedinvnet simulate SCENARIO.json --policy $METHOD
    codedinvnet plan SCENARIO.json --p999-ms 150 --policy $METHOD
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codedinvnet.codes.base import Encoded, Scheme, ScoresCode
from codedinvnet.codes.method import ONE, Given, Method, Tolerance
from codedinvnet.codes.rules import Parities
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import prepare


def weights(size: int) -> Tensor:
    """Return the members' weights in the two parities, (2, size): equal ones, and rising ones."""
    rising = torch.arange(1.0, size + 1, dtype=torch.float64)
    return torch.stack([torch.full_like(rising, 1 / size), rising / rising.sum()])


class WeightedCode(ScoresCode):
    """Any two missing members are solved for; of one alone, both parities are heard."""

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return the weighted mean of the members (B, m, *input)."""
        images = prepare(queries, padding=0)
        row = weights(images.shape[1])[task - self.rules.k].to(images)
        return Encoded(torch.einsum("m,bm...->b...", row, images))

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        """Return scores (B, classes) of a missing member, by least squares."""
        missing = [i for i in range(size) if i not in outputs]
        parities = [task for task in (self.rules.k, self.rules.k + 1) if task in outputs]
        scores = torch.stack([outputs[task] for task in parities], dim=1)
        rows = weights(size).to(scores)[[task - self.rules.k for task in parities]]
        for i in range(size):
            if i in outputs:
                scores = scores - rows[:, i, None] * outputs[i][:, None]
        solution = torch.linalg.pinv(rows[:, missing])[missing.index(member)]
        return torch.einsum("p,bpc->bc", solution, scores)


class TwoParities(Method):
    """One query's work for each parity: an overhead of 2/k."""

    name = "two-parities"

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> Parities:
        """Return those of two parities that the served model computes."""
        return Parities(k, r=2)

    def build(self, given: Given) -> Scheme:
        """Join the code with the classifier that is protected."""
        return self.scheme(WeightedCode(self.rules(given.k)), given)
