"""NeRCC / LeTCC: smoothing splines through any classifier.

Moradi, Tahmasebi & Maddah-Ali, *NeRCC: Nested-Regression Coded Computing for Resilient Distributed
Prediction Serving Systems*, arXiv 2402.04377; *Coded Computing for Resilient Distributed Computing:
A Learning-Theoretic Framework*, arXiv 2406.00300. Green & Silverman, *Nonparametric Regression and
Generalized Linear Models*, 1994, chapter 2, for the splines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.interpolation import Interpolating, any_of
from codedinvnet.codes.method import Given, Method
from codedinvnet.codes.patterns import erasure_patterns
from codedinvnet.codes.rules import AnyOf
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import BundleInfo

ENCODER_SMOOTHING, DECODER_SMOOTHING = 1e-6, 1e-6
"""Regularisers for a group that was not tuned for."""
CANDIDATES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What `tune` tries for each of the two."""
TUNING_PATTERNS = 100
"""Sets of missing workers that `tune` tries at most; more are sampled."""


def _curvature(knots: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q (n, n − 2) and R (n − 2, n − 2) of n rising knots, n ≥ 3.

    The second derivatives at the inner knots of the natural cubic spline through g are R⁻¹Qᵀg, and
    ∫ s″² = gᵀ Q R⁻¹ Qᵀ g (Green & Silverman, section 2.1).
    """
    h = knots.diff()
    inner = len(knots) - 2
    q = knots.new_zeros(len(knots), inner)
    rows = torch.arange(inner)
    q[rows, rows] = 1 / h[:-1]
    q[rows + 1, rows] = -1 / h[:-1] - 1 / h[1:]
    q[rows + 2, rows] = 1 / h[1:]
    r = torch.diag((h[:-1] + h[1:]) / 3)
    r = r + torch.diag(h[1:-1] / 6, 1) + torch.diag(h[1:-1] / 6, -1)
    return q, r


def natural_spline_matrix(points: Tensor, knots: Tensor) -> Tensor:
    """Return the weights of the natural cubic spline through values at the knots.

    Two knots give a line, one a constant. Outside the knots the spline goes on as a line.

    Args:
        points: (P,) float64.
        knots: (n,) float64, rising, distinct.

    Returns:
        (P, n) float64.
    """
    from scipy.interpolate import CubicSpline  # takes long to import

    if len(knots) == 1:
        return points.new_ones(len(points), 1)
    spline = CubicSpline(knots.numpy(), np.eye(len(knots)), bc_type="natural")
    inside = points.clamp(knots[0], knots[-1])
    value, slope = (torch.from_numpy(spline(inside.numpy(), order)) for order in (0, 1))
    return value + (points - inside)[:, None] * slope


def smoothing_spline_matrix(points: Tensor, knots: Tensor, smoothing: float) -> Tensor:
    """Return the weights of the smoothing spline over values at the knots.

    It is the s with the least Σ (y_i − s(knot_i))² / n + λ ∫ s″²; straight lines are kept whatever
    λ is. Solved directly (Reinsch), so that any number of knots will do.

    Args:
        points: (P,) float64.
        knots: (n,) float64, distinct, in any order.
        smoothing: λ ≥ 0; 0 interpolates.

    Returns:
        (P, n) float64.
    """
    order = knots.argsort()
    knots = knots[order]
    n = len(knots)
    weights = natural_spline_matrix(points, knots)
    if n > 2 and smoothing > 0:
        q, r = _curvature(knots)
        roughness = q @ torch.linalg.solve(r, q.T)
        identity = torch.eye(n, dtype=knots.dtype)
        fitted = torch.linalg.inv(identity + n * smoothing * roughness)
        weights = weights @ fitted
    unsorted = torch.empty_like(weights)
    unsorted[:, order] = weights
    return unsorted


class SplineCode(Interpolating):
    """A smoothing spline as encoder, another as decoder (NeRCC: 2402.04377, section III).

    LeTCC (2406.00300) derives the same two regularisers for any computation. α are Chebyshev points
    of the first kind, β of the second.

    Args:
        rules: k, and how many outputs there are and are needed.
        smoothing: λ of the encoder and of the decoder.

    Raises:
        UserError: if a λ is below 0.
    """

    def __init__(
        self,
        rules: AnyOf,
        *,
        smoothing: tuple[float, float] = (ENCODER_SMOOTHING, DECODER_SMOOTHING),
    ) -> None:
        if not min(smoothing) >= 0:
            raise UserError(
                f"both smoothings must be at least 0, got {smoothing[0]} and {smoothing[1]}"
            )
        self.encoder_smoothing, self.decoder_smoothing = smoothing
        super().__init__(rules)

    def encoding_matrix(self) -> Tensor:
        return smoothing_spline_matrix(self.nodes, self.points, self.encoder_smoothing)

    def decoding_matrix(self, tasks: tuple[int, ...]) -> Tensor:
        nodes = self.nodes[list(tasks)]
        return smoothing_spline_matrix(self.points, nodes, self.decoder_smoothing)


class NeRCC(Method):
    """Smoothing splines on k + S workers, whose regularisers are chosen on validation images."""

    name = "nercc"
    any_stragglers = True

    def versions(self) -> Mapping[str, Any]:
        tuning = {"candidates": [*CANDIDATES], "patterns": TUNING_PATTERNS}
        return {**super().versions(), "tuning": tuning}

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> AnyOf:
        return any_of(self.name, k, k + stragglers, stragglers)

    def build(self, given: Given) -> Scheme:
        encoder, decoder = given.chosen.get("smoothing", (ENCODER_SMOOTHING, DECODER_SMOOTHING))
        rules = self.rules(given.k, given.stragglers)
        code = SplineCode(rules, smoothing=(encoder, decoder))
        return self.scheme(code, given)

    def tune(
        self,
        given: Given,
        groups: Tensor,
        labels: Tensor,
        candidates: Sequence[float] = CANDIDATES,
    ) -> Mapping[str, Any]:
        """Choose the two regularisers by accuracy on validation groups.

        Every set of S workers is left out in turn, or a sample of the sets. Of equally good pairs
        the smaller one is taken.
        """
        k, stragglers = given.k, given.stragglers

        def scheme(*smoothing: float) -> Scheme:
            return self.build(replace(given, chosen={"smoothing": smoothing}))

        best: tuple[float, float, float] | None = None
        lost_sets = erasure_patterns(k, stragglers, stragglers, TUNING_PATTERNS, 0)
        for encoder in candidates:
            coded = scheme(encoder, 0.0)
            outputs = {
                task: torch.cat([coded.compute(task, part).output for part in groups.split(250)])
                for task in coded.rules.tasks(k)
            }
            for decoder in candidates:
                coded, correct = scheme(encoder, decoder), 0
                for lost in lost_sets:
                    rest = {task: output for task, output in outputs.items() if task not in lost}
                    answers = coded.decode(rest, k)
                    found = torch.stack([answers[i].argmax(1) for i in range(k)], dim=1)
                    correct += int((found.cpu() == labels.cpu()).sum())
                if best is None or correct > best[0]:
                    best = (correct, encoder, decoder)
        assert best is not None
        return {"smoothing": list(best[1:])}
