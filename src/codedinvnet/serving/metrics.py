"""What operators see: Prometheus metrics, and recent answers for the page."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from codedinvnet.common.quantiles import rank_of
from codedinvnet.net.logs import log_event
from codedinvnet.scheduler.actions import Decided
from codedinvnet.scheduler.scheduler import Scheduler
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
        self._answers: defaultdict[int, int] = defaultdict(int)
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
        return sum(self._answers.get(now - i, 0) for i in range(1, WINDOW + 1)) / WINDOW

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


LATENCY_BUCKETS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 60.0,
)  # fmt: skip
WORK_BUCKETS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0,
    5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
TAKEN = ("direct", "decoded", "guessed", "failed", "deadline", "cancelled")
"""How queries end that are taken."""
OUTCOMES = (*TAKEN, "rejected")
"""How queries end."""
CODES = (200, 400, 401, 404, 405, 408, 413, 421, 499, 500, 502, 503, 504)
"""Status codes of inference requests."""
REASONS = ("died", "hung", "failing", "wrong")
"""Why workers are replaced."""

Counters: TypeAlias = Callable[..., Counter]
Gauges: TypeAlias = Callable[..., Gauge]
Histograms: TypeAlias = Callable[..., Histogram]


def remember_labels(*metrics: Counter | Gauge | Histogram) -> None:
    """Have metrics find the figure of a label at once."""
    for metric in metrics:
        metric.labels = cache(metric.labels)  # type: ignore[assignment, method-assign]


class Metrics:
    """The service's figures; names begin with `codedinvnet_`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        space, registry = "codedinvnet", self.registry
        counter = partial(Counter, namespace=space, registry=registry)
        gauge = partial(Gauge, namespace=space, registry=registry)
        histogram = partial(Histogram, namespace=space, registry=registry)
        work = partial(histogram, buckets=WORK_BUCKETS)
        self._of_queries(counter, gauge, histogram, work)
        self._of_workers(counter, gauge, work)
        self._of_trust(counter, gauge)
        self.loop_lag = work("event_loop_lag_seconds", "How late the event loop wakes up.")
        self.asyncio_tasks = gauge("asyncio_tasks", "Tasks of the event loop.")
        ProcessCollector(registry=registry)  # of the front end: memory, processor time, open files
        self.recent = Recent()
        self._checks: deque[bool] = deque(maxlen=500)
        self._hedges = 0
        remember_labels(self.queries, self.requests, self.latency, self.tasks, self.worker_time)
        self._begin_at_zero()

    def _of_queries(
        self, counter: Counters, gauge: Gauges, histogram: Histograms, work: Histograms
    ) -> None:
        self.queries = counter(
            "queries", "Queries by outcome: direct, decoded, guessed, cancelled, or why they "
            "failed. A request that was turned away unparsed (rejected) counts as one.", ["outcome"]
        )  # fmt: skip
        self.requests = counter(
            "requests", "Inference requests by the HTTP status that was sent, or that means what "
            "was sent over gRPC; 499: the client had left.", ["code"]
        )  # fmt: skip
        self.hedges = counter(
            "hedges", "Copies of late queries, and of those whose approximate answer was withheld: "
            "queued, sent or not."
        )  # fmt: skip
        self.latency = histogram(
            "query_latency_seconds", "From a query's acceptance to its end, by outcome; none is "
            "of those rejected.", ["outcome"], buckets=LATENCY_BUCKETS
        )  # fmt: skip
        self.decode_time = work(
            "decode_seconds", "Decoding of one batch of answers, in the front end."
        )  # fmt: skip
        self.pending = gauge("pending_queries", "Unanswered queries.")
        self.policy = gauge(
            "policy", "1 of the policy that the service goes by, 0 of those that it went by "
            "before.", ["policy"]
        )  # fmt: skip
        self.doing = gauge(
            "auto", "1 of what the policy auto does about late answers, 0 of what it did before.",
            ["policy"]
        )  # fmt: skip

    def _of_workers(self, counter: Counters, gauge: Gauges, work: Histograms) -> None:
        self.worker_time = work(
            "worker_seconds", "Computing time of a task on its worker; a parity task's includes "
            "encoding.", ["task"]
        )  # fmt: skip
        self.encode_time = work("encode_seconds", "Encoding of one parity query, on its worker.")
        self.queue_depth = gauge("queue_depth", "Tasks that wait for a worker.")
        self.workers = gauge("workers", "Workers by state.", ["state"])
        self.restarts = counter(
            "worker_restarts", "Workers replaced; a silent one is hung.", ["reason"]
        )  # fmt: skip
        self.tasks = counter("tasks", "Tasks given to workers, by kind.", ["task"])
        self.task_failures = counter(
            "task_failures", "Tasks that raised on a worker, or whose output was no good.",
            ["worker"]
        )  # fmt: skip
        self.groups = counter(
            "groups", "First parity tasks sent, by the size of their group; again for one that "
            "was lost.", ["size"]
        )  # fmt: skip

    def _of_trust(self, counter: Counters, gauge: Gauges) -> None:
        self.agreement_checks = counter(
            "live_agreement_checks", "Members of complete groups that were decoded as if missing."
        )  # fmt: skip
        self.agreements = counter(
            "live_agreements", "Those of them whose decoded label was the direct one."
        )  # fmt: skip
        self.agreement = gauge(
            "live_recovered_agreement", "Share of the last checks that agreed; NaN before the "
            "first."
        )  # fmt: skip
        self.agreement.set(math.nan)
        self.releasing = gauge(
            "releasing", "Whether approximate answers are released: 0 while traffic breaks "
            "--max-disagreement; NaN without a calibration."
        )  # fmt: skip
        self.releasing.set(math.nan)
        self.drifting = gauge(
            "drifting", "Whether guesses disagree far more often than the calibration expects: "
            "inputs drift; NaN without --max-disagreement."
        )  # fmt: skip
        self.drifting.set(math.nan)
        self.withheld = counter(
            "withheld_answers", "Approximate answers that were not released, for their confidence "
            "or under drift."
        )  # fmt: skip
        self.released_checks = counter(
            "release_checks", "Comparisons of decoded and direct answers whose confidence reached "
            "the threshold."
        )  # fmt: skip
        self.released_disagreements = counter(
            "release_disagreements", "Those of them that disagreed."
        )  # fmt: skip
        self.wrong_workers = counter(
            "wrong_workers", "Workers that were found to answer wrongly.", ["worker"]
        )  # fmt: skip

    def _begin_at_zero(self) -> None:
        """Create what labels are known: Prometheus sees no increase in what begins above 0."""
        for outcome in OUTCOMES:
            self.queries.labels(outcome)
        for outcome in TAKEN:
            self.latency.labels(outcome)
        for code in CODES:
            self.requests.labels(str(code))
        for reason in REASONS:
            self.restarts.labels(reason)
        for kind in ("data", "parity"):
            self.tasks.labels(kind)
            self.worker_time.labels(kind)

    def expect(self, workers: int, size: int) -> None:
        """Create the labels of a service with so many workers and members of a group."""
        for worker in range(workers):
            self.task_failures.labels(str(worker))
            self.wrong_workers.labels(str(worker))
        for members in range(1, size + 1):
            self.groups.labels(str(members))

    def decided(self, decided: Decided) -> None:
        """Take down what `auto` does now, and log why."""
        self._one_of(self.doing, decided.policy)
        log_event("policy", **decided.summary)

    def policy_is(self, name: str) -> None:
        """Take down the policy; what `auto` did until now is over."""
        self._one_of(self.policy, name)
        self._one_of(self.doing)

    @staticmethod
    def _one_of(gauge: Gauge, name: str | None = None) -> None:
        """Set the gauge of a policy to 1, and the others to 0."""
        for samples in gauge.collect():
            for sample in samples.samples:
                gauge.labels(sample.labels["policy"]).set(0)
        if name is not None:
            gauge.labels(name).set(1)

    def ended(self, outcome: str, latency: float) -> None:
        """Count a query that was taken and has ended (latency in seconds)."""
        self.queries.labels(outcome).inc()
        self.latency.labels(outcome).observe(latency)

    def answered(self, outcome: str, latency: float) -> None:
        """Count a query that was answered (latency in seconds)."""
        self.ended(outcome, latency)
        self.recent.answer(outcome, latency)

    def checked(self, agrees: bool) -> None:
        """Count one comparison of a decoded with the direct answer."""
        self._checks.append(agrees)
        self.agreement_checks.inc()
        self.agreements.inc(agrees)
        self.agreement.set(sum(self._checks) / len(self._checks))

    def live_agreement(self) -> float | None:
        """Return the share of the last checks that agreed; None before the first."""
        return sum(self._checks) / len(self._checks) if self._checks else None

    def read_off(self, scheduler: Scheduler, pending: int) -> None:
        """Set what is read off: of the rules, and how many queries are unanswered."""
        self.queue_depth.set(scheduler.waiting)
        self.pending.set(pending)
        self.hedges.inc(scheduler.dispatcher.hedges - self._hedges)
        self._hedges = scheduler.dispatcher.hedges
        self.asyncio_tasks.set(len(asyncio.all_tasks()))

    def render(self) -> bytes:
        """Return the Prometheus text."""
        return generate_latest(self.registry)
