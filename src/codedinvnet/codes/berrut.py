"""ApproxIFER: rational interpolation through any classifier.

Soleymani, Ali, Mahdavifar & Avestimehr, *ApproxIFER: A Model-Agnostic Approach to Resilient and
Robust Prediction Serving Systems*, AAAI 2022. Berrut, *Rational functions for guaranteed and
experimentally well-conditioned global interpolation*, 1988.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.interpolation import Interpolating, any_of
from codedinvnet.codes.method import Given, Method
from codedinvnet.codes.rules import AnyOf
from codedinvnet.models.bundle import BundleInfo

MEETS = 1e-12
"""Points closer than this are one point: cosines of equal angles differ by some 1e-16."""


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


class BerrutCode(Interpolating):
    """Berrut's interpolant as encoder and decoder, for any k and S (paper, section 3)."""

    def encoding_matrix(self) -> Tensor:
        return berrut_matrix(self.nodes, self.points)

    def decoding_matrix(self, tasks: tuple[int, ...]) -> Tensor:
        return berrut_matrix(self.points, self.nodes[list(tasks)])


class ApproxIFER(Method):
    """ApproxIFER on k + S workers, for stragglers; its locator of wrong workers is left out.

    The points are those of the published code, β_i = cos(iπ / workers), not the text's.
    For some k and S they meet the α, where the interpolant is the node's value.
    """

    name = "approxifer"
    any_stragglers = True

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> AnyOf:
        return any_of(self.name, k, k + stragglers, stragglers)

    def build(self, given: Given) -> Scheme:
        return self.scheme(BerrutCode(self.rules(given.k, given.stragglers)), given)
