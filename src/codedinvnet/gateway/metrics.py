"""What a gateway counts, and quantiles of the last minutes."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the buckets of times."""
WINDOW, STEP = 300.0, 10.0
"""Seconds that the quantiles are of, and of which each part is kept."""
FINE = 1.05
"""The ratio of the bounds of neighbouring buckets of these quantiles."""
SHORTEST = 1e-4
"""Seconds; shorter times count as so many."""


@lru_cache(4)
def bucket_of(seconds: float) -> int:
    """Return n if FINE to the n-th times SHORTEST is the least bound that a time is within.

    Several histories ask for the bucket of one time.
    """
    return math.ceil(math.log(max(seconds, SHORTEST) / SHORTEST, FINE))


def quantiles_of(counts: Mapping[int, int], *shares: float) -> list[float | None]:
    """Return the seconds that a share of the times in buckets don't exceed; None without any."""
    number = sum(counts.values())
    found: list[float | None] = []
    for share in shares:
        seen = 0
        for bucket in sorted(counts):
            seen += counts[bucket]
            if seen >= share * number:
                found.append(SHORTEST * FINE**bucket)
                break
    return found if number else [None] * len(shares)


def milliseconds(seconds: float | None) -> float | None:
    """Return milliseconds, rounded as is fit to show."""
    return None if seconds is None else round(1000 * seconds, 2)


class RollingQuantiles:
    """Quantiles of the times of the last minutes, to 5 %."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, dict[int, int]]] = deque()

    def add(self, seconds: float) -> None:
        """Take a time in."""
        now = time.monotonic()
        if not self._steps or now - self._steps[-1][0] >= STEP:
            self._steps.append((now, {}))
            while now - self._steps[0][0] > WINDOW + STEP:
                self._steps.popleft()
        bucket = bucket_of(seconds)
        counts = self._steps[-1][1]
        counts[bucket] = counts.get(bucket, 0) + 1

    def quantiles(self, *shares: float) -> list[float | None]:
        """Return the quantiles of these minutes, see `quantiles_of`."""
        now, total = time.monotonic(), dict[int, int]()
        for at, counts in self._steps:
            if now - at <= WINDOW + STEP:
                for bucket, count in counts.items():
                    total[bucket] = total.get(bucket, 0) + count
        return quantiles_of(total, *shares)


class Times:
    """Counts times by the buckets of `SECONDS`."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Take a time in."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


class TimesByLabel(Collector):
    """A histogram of times with one label.

    Each request has three times. To take one in, the library's own histogram, which is safe for
    threads and looks at one bound after another, needs 1.5 us, and this one 0.3.
    """

    def __init__(self, name: str, what: str, label: str) -> None:
        self._described = name, what, [label]
        self._children: dict[str, Times] = {}

    def labels(self, value: str) -> Times:
        """Return what counts the times of a label's value."""
        return self._children.setdefault(value, Times())

    def remove(self, value: str) -> None:
        """Show a label's value no longer."""
        self._children.pop(value, None)

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Yield the name and meaning, without times."""
        name, what, label = self._described
        yield HistogramMetricFamily(name, what, labels=label)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram as it is now."""
        (family,) = self.describe()
        bounds = [*(str(float(bound)) for bound in SECONDS), "+Inf"]
        for value, times in list(self._children.items()):
            buckets = zip(bounds, accumulate(times.counts), strict=True)
            family.add_metric([value], list(buckets), times.total)
        yield family


class GatewayMetrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"codedinvnet_gateway_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"codedinvnet_gateway_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, label: str) -> TimesByLabel:
            made = TimesByLabel(f"codedinvnet_gateway_{name}", what, label)
            registry.register(made)
            return made

        self.requests = counter(
            "requests", "Requests by how they ended: direct, fallback, failed, deadline, refused, "
            "cancelled or aborted (in mid-stream); and by the class of the status that clients "
            "got: 2xx to 5xx, or none. Route unread: refused by what their heads say.",
            "route", "outcome", "status",
        )  # fmt: skip
        self.request_seconds = histogram(
            "request_seconds", "From a request's arrival to its first content.", "route"
        )
        self.queue_seconds = histogram(
            "queue_seconds", "Until a request was given to an upstream, or ended without.", "route"
        )
        self.hedges = counter(
            "hedges", "Copies of late requests: they won, lost, the budget refused them, or the "
            "request was held out to show what happens without.",
            "route", "result",
        )  # fmt: skip
        self.hedge_delay = gauge(
            "hedge_delay_seconds", "After which a request is copied now.", "route"
        )
        self.proof = gauge(
            "proof_seconds", "Quantiles of requests' times, with copies as they are and without, "
            "and the ends of their 95 % intervals; what is not known is left out.",
            "route", "copies", "quantile", "end",
        )  # fmt: skip
        self.copies = gauge(
            "copies_share", "The share of a route's attempts, and of the seconds that they took, "
            "that is of copies.", "route", "of",
        )  # fmt: skip
        self.attempts = counter(
            "attempts", "Requests sent to upstreams, by how they ended: ok, error (the request's "
            "own), status (the upstream's fault), limited (429), broken, refused, silent, lost, "
            "cancelled, no_files (the gateway may open no more).", "upstream", "result",
        )  # fmt: skip
        self.attempt_seconds = histogram(
            "attempt_seconds", "Until an upstream's first content, or the attempt's end.",
            "upstream",
        )  # fmt: skip
        self.retries = counter("retries", "Failed requests: sent again or refused.", "result")
        for result in ("sent", "refused"):
            self.retries.labels(result)
        self.ejections = counter("ejections", "Upstreams that were ejected.", "upstream", "cause")
        self.up = gauge("upstream_up", "Whether an upstream takes requests.", "upstream")
        self.in_flight = gauge("in_flight", "Requests that an upstream has in hand.", "upstream")
        self.pending = gauge("pending", "Requests that have no answer yet.")
        self.queued = gauge("queued", "Requests that no upstream was given yet.")
        self.members = gauge("members", "Gateways that this one decides for; 0: another decides.")
        self.members_refused = gauge("members_refused", "Members that differ, and don't join.")
        self.message_seconds = gauge("message_seconds", "A message's way to who decides, lately.")
        self.alone = gauge("alone", "How often this member lost who decides, and decided alone.")
        self.memory = gauge("memory_bytes", "Held by requests and by answers on their way.")
        self.memory_limit = gauge("memory_limit_bytes", "The most that may be held.")
        self.connections = gauge("connections", "Of clients.")
        self.loop_lag = Histogram(
            "codedinvnet_gateway_loop_lag_seconds", "How late the event loop is.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
