"""What non-systematic codes over an interpolation share: points, encoding, decoding.

The k queries are values of a curve u at points α. Worker i classifies u(β_i), a query of no
member. The answers are values of the curve f(u(·)) at β, from which it is read off at α again.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from codedinvnet.devices import first_tensor
from codedinvnet.errors import UserError
from codedinvnet.methods.base import check_k
from codedinvnet.model import prepare


def first_kind(count: int) -> Tensor:
    """Return the Chebyshev points of the first kind, cos((2j + 1)π / 2n), falling, float64."""
    return torch.cos((2 * torch.arange(count, dtype=torch.float64) + 1) * math.pi / (2 * count))


def second_kind(count: int, *, closed: bool = False) -> Tensor:
    """Return Chebyshev points of the second kind, falling, float64.

    They begin at 1. Without `closed` −1, where they would end, is left out: cos(iπ / n) for
    i = 0 … n − 1; else they are cos(iπ / (n − 1)).
    """
    intervals = max(1, count - 1) if closed else count
    return torch.cos(torch.arange(count, dtype=torch.float64) * math.pi / intervals)


class Interpolating(ABC):
    """A code in which every task needs all members, and any k + r − S outputs answer them all.

    Args:
        classifier: maps images (B, C, H, W), whose values may leave 0..1, to logits (B, classes).
        k: queries in a group.
        workers: k + r.
        stragglers: S, the outputs that may be missing.

    Raises:
        UserError: if k is below 2 or the stragglers below 0.
    """

    name: str
    closed = False
    """Whether both ends of −1..1 are among the β."""
    fixed_size = True
    guesses = False

    def __init__(self, classifier: nn.Module, k: int, *, workers: int, stragglers: int) -> None:
        check_k(k)
        if stragglers < 0:
            raise UserError(f"{self.name}: stragglers must be at least 0, got {stragglers}")
        self.classifier, self.k, self.r = classifier, k, workers - k
        self.workers, self.needed = workers, workers - stragglers
        self.points, self.nodes = first_kind(k), second_kind(workers, closed=self.closed)
        self.device = first_tensor(classifier).device
        self.parameters = sum(p.numel() for p in classifier.parameters())
        self.encode_seconds = 0.0
        self.encoding = self.encoding_matrix()
        self._decodings: dict[tuple[int, ...], Tensor] = {}

    @abstractmethod
    def encoding_matrix(self) -> Tensor:
        """Return (workers, k) float64: the weights of the queries in each worker's query."""

    @abstractmethod
    def decoding_matrix(self, tasks: tuple[int, ...]) -> Tensor:
        """Return (k, len(tasks)) float64: the weights of these tasks' outputs in the answers."""

    def tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return k + r tasks that all need everybody."""
        if size != self.k:
            raise ValueError(f"a group of {self.name} has {self.k} members, got {size}")
        return {task: tuple(range(size)) for task in range(self.workers)}

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return everybody if enough outputs are here, else nobody."""
        enough = sum(task in available for task in range(self.workers)) >= self.needed
        return frozenset(range(size)) if enough else frozenset()

    @torch.inference_mode()
    def compute(self, task: int, queries: Tensor) -> Tensor:
        """Classify the mixture of the group (B, k, C, H, W) that this worker is given."""
        queries = queries.to(self.device)
        began = time.perf_counter()
        images = prepare(queries, 0)
        weights = self.encoding[task].to(images)
        coded = torch.einsum("m,bm...->b...", weights, images)
        self.encode_seconds = time.perf_counter() - began
        logits: Tensor = self.classifier(coded)
        return logits

    def direct(self, output: Tensor) -> Tensor | None:
        """Return None: no output is a member's own."""
        return None

    @torch.inference_mode()
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer all members if enough outputs are here."""
        if not self.recoverable(frozenset(outputs), size):
            return {}
        tasks = tuple(sorted(task for task in outputs if task < self.workers))
        values = torch.stack([outputs[task] for task in tasks], dim=1)
        return dict(enumerate(self.answers(tasks, values).unbind(dim=1)))

    def answers(self, tasks: tuple[int, ...], values: Tensor) -> Tensor:
        """Map the outputs (B, len(tasks), classes) of these tasks to logits (B, k, classes)."""
        if tasks not in self._decodings:
            self._decodings[tasks] = self.decoding_matrix(tasks)
        return torch.einsum("kn,bnc->bkc", self._decodings[tasks].to(values), values)

    @torch.inference_mode()
    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        """Return how far the answers move, at most, when one output is left out, (B,).

        The root mean square over members and classes. It is not zero for a correct group, since
        the classifier is not a rational function or a spline of its input, but a corrupt output
        makes it large.
        """
        if self.needed >= self.workers or any(t not in outputs for t in range(self.workers)):
            return None
        values = torch.stack([outputs[task] for task in range(self.workers)], dim=1)
        everybody = tuple(range(self.workers))
        complete = self.answers(everybody, values)
        moves = []
        for left_out in everybody:
            rest = [task for task in everybody if task != left_out]
            moved = self.answers(tuple(rest), values[:, rest]) - complete
            moves.append(moved.square().mean(dim=(1, 2)).sqrt())
        return torch.stack(moves).amax(dim=0)
