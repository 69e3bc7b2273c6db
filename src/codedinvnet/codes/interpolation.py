"""What non-systematic codes over an interpolation share: points, encoding, decoding.

The k queries are values of a curve u at points α. Worker i classifies u(β_i), a query of no
member. The answers are values of the curve f(u(·)) at β, from which it is read off at α again.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from codedinvnet.codes.base import Code, check_k
from codedinvnet.codes.rules import AnyOf
from codedinvnet.common.errors import UserError
from codedinvnet.models.coded import prepare


def first_kind(count: int) -> Tensor:
    """Return the Chebyshev points of the first kind, cos((2j + 1)π / 2n), falling, float64."""
    return torch.cos((2 * torch.arange(count, dtype=torch.float64) + 1) * math.pi / (2 * count))


def second_kind(count: int) -> Tensor:
    """Return Chebyshev points of the second kind without −1, cos(iπ / n), falling, float64."""
    return torch.cos(torch.arange(count, dtype=torch.float64) * math.pi / count)


def any_of(name: str, k: int, workers: int, stragglers: int) -> AnyOf:
    """Return the rules of a code in which all but so many stragglers determine everybody."""
    check_k(k)
    if stragglers < 0:
        raise UserError(f"{name}: stragglers must be at least 0, got {stragglers}")
    return AnyOf(k, workers, workers - stragglers)


class Interpolating(Code):
    """A code in which every task needs all members, and any k + r − S outputs answer them all.

    Args:
        rules: k, and how many outputs there are and are needed.
    """

    rules: AnyOf

    def __init__(self, rules: AnyOf) -> None:
        self.rules = rules
        self.points = first_kind(rules.k)
        self.nodes = second_kind(rules.workers)
        self.encoding = self.encoding_matrix()
        self._decodings: dict[tuple[int, ...], Tensor] = {}

    @abstractmethod
    def encoding_matrix(self) -> Tensor:
        """Return (workers, k) float64: the weights of the queries in each worker's query."""

    @abstractmethod
    def decoding_matrix(self, tasks: tuple[int, ...]) -> Tensor:
        """Return (k, len(tasks)) float64: the weights of these tasks' outputs in the answers."""

    def encode(self, task: int, queries: Tensor) -> Tensor:
        """Mix the group (B, k, *input) as this worker is given it."""
        queries = prepare(queries, 0)
        weights = self.encoding[task].to(queries)
        return torch.einsum("m,bm...->b...", weights, queries)

    def direct(self, output: Tensor) -> Tensor | None:
        """Return None: no output is a member's own."""
        return None

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer all members if enough outputs are here."""
        if not self.rules.recoverable(frozenset(outputs), size):
            return {}
        tasks = tuple(sorted(task for task in outputs if task < self.rules.workers))
        values = torch.stack([outputs[task] for task in tasks], dim=1)
        return dict(enumerate(self.answers(tasks, values).unbind(dim=1)))

    def answers(self, tasks: tuple[int, ...], values: Tensor) -> Tensor:
        """Map the outputs (B, len(tasks), classes) of these tasks to logits (B, k, classes)."""
        if tasks not in self._decodings:
            self._decodings[tasks] = self.decoding_matrix(tasks)
        return torch.einsum("kn,bnc->bkc", self._decodings[tasks].to(values), values)
