"""Recent requests and tasks, for the page's chart."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from codedinvnet.evaluation.quantiles import rank_of
from codedinvnet.serving.answers import Answered, Cancelled, QueryFailed

KEPT = 3000
"""Requests and tasks that are kept: enough for a few seconds."""


class Recent:
    """The newest requests and tasks. Memory is bounded; times are in seconds."""

    def __init__(self) -> None:
        self._requests: deque[tuple[float, int, float | None]] = deque(maxlen=KEPT)
        """When each ended, its queries, and its latency; None if a query failed."""
        self._tasks: deque[tuple[float, float]] = deque(maxlen=KEPT)
        """When each ended, and for how long it kept its worker busy."""

    def request(self, found: Sequence[Answered | QueryFailed], read: float = 0.0) -> None:
        """Record a request that ended now.

        Args:
            found: how each of its queries ended.
            read: seconds that reading and parsing it took.
        """
        answers = [answer.seconds for answer in found if isinstance(answer, Answered)]
        if answers or not any(isinstance(answer, Cancelled) for answer in found):
            latency = read + max(answers, default=0.0) if len(answers) == len(found) else None
            self._requests.append((time.monotonic(), len(found), latency))

    def task(self, occupied: float) -> None:
        """Record a call that ended now and kept its worker busy for so long."""
        self._tasks.append((time.monotonic(), occupied))

    def summary(self, seconds: float, normal: float) -> dict[str, float] | None:
        """Return p50 and p99 in ms of the last seconds, and the work per query.

        Args:
            seconds: how far to look back.
            normal: what a data task takes in seconds, which is the unit of work.
        """
        since = time.monotonic() - seconds
        requests = [entry for entry in self._requests if entry[0] >= since]
        latency = sorted(value for _, _, value in requests if value is not None)
        if not latency or not normal:
            return None
        busy = sum(occupied for at, occupied in self._tasks if at >= since)
        return {
            "p50": round(1000 * latency[rank_of(len(latency), 0.5)], 2),
            "p99": round(1000 * latency[rank_of(len(latency), 0.99)], 2),
            "work": round(busy / normal / sum(queries for _, queries, _ in requests), 3),
        }
