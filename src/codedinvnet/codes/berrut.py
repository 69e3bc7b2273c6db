"""ApproxIFER: rational interpolation through any classifier, and a locator of wrong workers.

Soleymani, Ali, Mahdavifar & Avestimehr, *ApproxIFER: A Model-Agnostic Approach to Resilient and
Robust Prediction Serving Systems*, AAAI 2022. Berrut, *Rational functions for guaranteed and
experimentally well-conditioned global interpolation*, 1988.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.interpolation import Interpolating, any_of
from codedinvnet.codes.method import BARS, ONE, Given, Method, Published, Tolerance
from codedinvnet.codes.rules import AnyOf
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import BundleInfo

MEETS = 1e-12
"""Points closer than this are one point: cosines of equal angles differ by some 1e-16."""
FARTHEST = 1e6
"""Outputs count as at most so many times their median in the search for wrong ones: a larger one
would drown another that is wrong in rounding."""


def berrut_matrix(points: Tensor, nodes: Tensor) -> Tensor:
    """Return the weights of Berrut's rational interpolant.

    r(z) = Σ_i (−1)^i y_i / (z − node_i) / Σ_i (−1)^i / (z − node_i), with i the rank among *these*
    nodes, which keeps r free of poles whichever are missing. Where z meets a node, the
    singularity is removable, and r is the node's value.

    Args:
        points: (P,) float64, where r is wanted.
        nodes: (N,) float64, distinct, in any order.

    Returns:
        (P, N) float64; its rows sum to 1.
    """
    rank = nodes.argsort().argsort()
    signs = 1.0 - 2.0 * (rank % 2).to(nodes)
    difference = points[:, None] - nodes[None, :]
    meets = difference.abs() < MEETS
    weights = signs / difference.masked_fill(meets, 1.0)
    weights = torch.where(meets.any(dim=1, keepdim=True), meets.to(nodes), weights)
    return weights / weights.sum(dim=1, keepdim=True)


def locate_errors(values: Tensor, nodes: Tensor, k: int, errors: int) -> Tensor:
    """Find the workers whose outputs no rational function of the code's degree explains.

    Algorithms 1 and 2 of the paper. For every class, polynomials P and Q of degree k + E − 1 are
    sought with P(β_i) = y_i Q(β_i) for all i: Q vanishes where y is wrong. The E nodes with the
    smallest |Q| get a vote, and the E nodes with most votes are the wrong ones. Here P and Q are
    written in Chebyshev polynomials and normed to 1, which the paper's monomials with Q(0) = 1 do
    not allow to be well conditioned. An output with a value that is not finite is wrong for sure.

    Args:
        values: outputs (B, n, classes).
        nodes: their β, (n,) float64, n ≥ 2(k + E).
        k: queries in a group.
        errors: E, how many to find.

    Returns:
        (B, n) bool, E of them true in each row.
    """
    degree = k + errors
    basis = [torch.ones_like(nodes), nodes]
    while len(basis) < degree:
        basis.append(2 * nodes * basis[-1] - basis[-2])
    vandermonde = torch.stack(basis[:degree], dim=1)
    finite = values.isfinite().all(dim=2)
    y = values.where(finite[..., None], 0.0).transpose(1, 2).to(nodes)
    most = FARTHEST * y.abs().median(dim=2, keepdim=True).values.clamp_min(1e-12)
    y = y.clamp(-most, most)
    y = y / y.abs().amax(dim=2, keepdim=True).clamp_min(1e-12)
    right = -y[..., None] * vandermonde
    system = torch.cat([vandermonde.expand_as(right), right], dim=3)
    # The right singular vector of the smallest singular value: the P and Q that fit best.
    q = torch.linalg.svd(system, full_matrices=False).Vh[..., -1, degree:]
    sizes = (vandermonde @ q[..., None])[..., 0].abs()
    suspects = sizes.topk(errors, dim=2, largest=False).indices
    votes = torch.zeros_like(sizes).scatter_(2, suspects, 1.0).sum(dim=1)
    votes = votes.masked_fill(~finite.to(votes.device), math.inf)
    wrong = votes.topk(errors, dim=1).indices
    return torch.zeros_like(votes, dtype=torch.bool).scatter_(1, wrong, True)


class BerrutCode(Interpolating):
    """Berrut's interpolant as encoder and decoder, for any k and S (paper, sections 3 and 4).

    Args:
        rules: k, and how many outputs there are and are needed.
        errors: E, the outputs that may be wrong.
    """

    def __init__(self, rules: AnyOf, *, errors: int = 0) -> None:
        super().__init__(rules)
        self.errors = errors

    def encoding_matrix(self) -> Tensor:
        return berrut_matrix(self.nodes, self.points)

    def decoding_matrix(self, tasks: tuple[int, ...]) -> Tensor:
        return berrut_matrix(self.points, self.nodes[list(tasks)])

    def answers(self, tasks: tuple[int, ...], values: Tensor) -> Tensor:
        """Decode from the outputs that are not found wrong, a set of them at a time."""
        if not self.errors:
            return super().answers(tasks, values)
        wrong = locate_errors(values, self.nodes[list(tasks)], self.rules.k, self.errors)
        patterns, which = wrong.unique(dim=0, return_inverse=True)
        answers = values.new_empty(len(values), self.rules.k, values.shape[2])
        for number, pattern in enumerate(patterns):
            rows, kept = which == number, ~pattern
            used = tuple(t for t, keep in zip(tasks, kept.tolist(), strict=True) if keep)
            answers[rows] = super().answers(used, values[rows][:, kept])
        return answers


class ApproxIFER(Method):
    """ApproxIFER without errors, on k + S workers.

    The points are those of the published code, β_i = cos(iπ / workers), not the text's.
    For some k and S they meet the α, where the interpolant is the node's value.
    """

    name = "approxifer"
    rank = 4
    published: ClassVar[tuple[Published, ...]] = (
        Published("mnist", 10, 99.0, 87.2, BARS),
        Published("fashion", 10, 97.0, 73.0, BARS),
        Published("cifar10", 10, 94.0, 77.4, BARS),
    )
    chooses: ClassVar[tuple[str, ...]] = ("stragglers",)

    def rules(self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None) -> AnyOf:
        return any_of(self.name, k, k + tolerance.stragglers, tolerance.stragglers)

    def build(self, given: Given) -> Scheme:
        errors = given.tolerance.errors if "errors" in self.chooses else 0
        rules = self.rules(given.k, given.tolerance)
        return self.scheme(BerrutCode(rules, errors=errors), given)


class RobustApproxIFER(ApproxIFER):
    """ApproxIFER's Byzantine variant: it finds E wrong of 2(k + E) + S outputs (section 4)."""

    name = "approxifer-byzantine"
    rank = 7
    in_brief = False
    published = ()
    chooses = ("stragglers", "errors")

    def rules(self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None) -> AnyOf:
        stragglers, errors = tolerance
        if errors < 0:
            raise UserError(f"{self.name}: errors must be at least 0, got {errors}")
        workers = 2 * (k + errors) + stragglers if errors else k + stragglers
        return any_of(self.name, k, workers, stragglers)
