"""Recent answers, requests and calls, for the page."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence

from codedinvnet.scheduler.quantiles import rank_of
from codedinvnet.serving.answers import Answered, Cancelled, QueryFailed

KEPT = 3000
"""Requests, calls, and latencies of each outcome that are kept."""
WINDOW = 5
"""Seconds that the throughput is measured over."""


class Recent:
    """The newest answers, requests and calls. Memory is bounded; times are in seconds."""

    def __init__(self) -> None:
        self._latencies: dict[str, deque[float]] = {}
        self._requests: deque[tuple[float, int, float | None]] = deque(maxlen=KEPT)
        """When each ended, its queries, and its latency; None if a query failed."""
        self._calls: deque[tuple[float, float]] = deque(maxlen=KEPT)
        """When each ended, and for how long it kept its worker busy."""
        self._answers: Counter[int] = Counter()
        """Second -> how many queries were answered in it, of the last seconds."""

    def answer(self, outcome: str, latency: float) -> None:
        """Record the answer to a query."""
        self._latencies.setdefault(outcome, deque(maxlen=KEPT)).append(latency)
        second = int(time.monotonic())
        if second not in self._answers:
            for old in [s for s in self._answers if s < second - WINDOW]:
                del self._answers[old]
        self._answers[second] += 1

    def request(self, found: Sequence[Answered | QueryFailed], read: float = 0.0) -> None:
        """Record a request that ended now, and that took `read` seconds to read and parse."""
        answers = [answer.seconds for answer in found if isinstance(answer, Answered)]
        if answers or not any(isinstance(answer, Cancelled) for answer in found):
            latency = read + max(answers, default=0.0) if len(answers) == len(found) else None
            self._requests.append((time.monotonic(), len(found), latency))

    def call(self, occupied: float) -> None:
        """Record a call that ended now and kept its worker busy for so long."""
        self._calls.append((time.monotonic(), occupied))

    def throughput(self) -> float:
        """Return answers per second in the last whole seconds."""
        now = int(time.monotonic())
        return sum(self._answers[now - i] for i in range(1, WINDOW + 1)) / WINDOW

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Return p50, p99 and p99.9 of the latencies in ms, by outcome."""
        shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
        return {
            outcome: {name: _ms(sorted(latencies), share) for name, share in shares.items()}
            for outcome, latencies in self._latencies.items()
        }

    def summary(self, seconds: float, normal: float) -> dict[str, float] | None:
        """Return p50 and p99 in ms of the last seconds, and the work per query.

        The unit of work is what a data task takes, `normal` seconds.
        """
        since = time.monotonic() - seconds
        requests = [entry for entry in self._requests if entry[0] >= since]
        latency = sorted(value for _, _, value in requests if value is not None)
        if not latency or not normal:
            return None
        busy = sum(occupied for at, occupied in self._calls if at >= since)
        work = busy / normal / sum(queries for _, queries, _ in requests)
        return {"p50": _ms(latency, 0.5), "p99": _ms(latency, 0.99), "work": round(work, 3)}


def _ms(ordered: Sequence[float], share: float) -> float:
    return round(1000 * ordered[rank_of(len(ordered), share)], 2)
