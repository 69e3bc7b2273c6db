"""Queries in flight: each ends once, with an answer or an error, and is counted then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codedinvnet.net.logs import Quiet
from codedinvnet.scheduler.actions import DEADLINE
from codedinvnet.scheduler.admission import Admission
from codedinvnet.serving.answers import (
    Answered,
    Cancelled,
    DeadlinePassed,
    InputRefused,
    QueryFailed,
)
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.tracing import RequestSpan, current_request
from codedinvnet.serving.workers.pool import Origin


@dataclass(eq=False, slots=True)
class InFlightQuery:
    """A query in flight."""

    began: float
    future: asyncio.Future[Answered]
    origin: Origin | None
    """Its place in its request, until it was sent for the first time."""
    request: str | None = None
    """What its client calls the request, for the log."""
    limit: float | None = None
    """The limit on disagreement that the request asks for."""
    decoded: Mapping[str, np.ndarray] | None = None
    """The outputs of the approximate answer, once there is one."""
    agreement: float | None = None
    """The calibrated probability that it agrees; None without a calibration."""
    ready: float = 0.0
    """When all that its answer is made of was here."""
    outcome: str = ""
    """Of this answer."""
    failure: str = ""
    """Why a worker had no answer to it, the last time."""
    failed_at: set[int] = field(default_factory=set)
    """Workers that computed it alone, and failed."""
    workers: list[int] = field(default_factory=list)
    """Those that were given a task for it, in that order."""
    trace: RequestSpan | None = field(default_factory=current_request)
    """The span of its request, if that is traced."""

    @property
    def named(self) -> dict[str, Any]:
        """What the log says of its request."""
        return {} if self.request is None else {"id": self.request}


class InFlight(dict[int, InFlightQuery]):
    """The queries in flight by their numbers."""

    def __init__(self, metrics: Metrics, admission: Admission) -> None:
        super().__init__()
        self.metrics, self.admission = metrics, admission
        self.direct: Callable[[int, InFlightQuery], None] | None = None
        """Called with the worker of each direct answer."""
        self._failed = Quiet()

    def sent(self, queries: Iterable[int], worker: int) -> tuple[Origin, ...]:
        """Take down that a worker gets a task for queries.

        Returns:
            The origins of those that are sent for the first time. A copy has none: a fault that
            hits a request hits it once.
        """
        origins = []
        for number in queries:
            if (query := self.get(number)) is not None:
                query.workers.append(worker)
                if query.origin is not None:
                    origins.append(query.origin)
                    query.origin = None
        return tuple(origins)

    def ready(self, queries: Iterable[int], outcome: str) -> None:
        """Take down that everything is here that their answers are made of."""
        now = time.monotonic()
        for number in queries:
            if (query := self.get(number)) is not None:
                query.ready, query.outcome = now, outcome

    def failed(self, queries: Iterable[int], reason: str) -> None:
        """Take down why a worker had no answer to queries; others may have."""
        for number in queries:
            if (query := self.get(number)) is not None:
                query.failure = reason

    def answer(
        self, number: int, outputs: Mapping[str, np.ndarray], worker: int | None = None
    ) -> None:
        """End a query with an answer, which is direct if a worker's."""
        query = self.get(number)
        if query is None or query.future.done():  # whoever cancelled it counts it
            return
        now, agreement = time.monotonic(), query.agreement
        if worker is not None:
            query.ready, query.outcome, agreement = now, "direct", None
            if self.direct is not None:
                self.direct(worker, query)
        work = query.ready - query.began
        found = Answered(outputs, query.outcome, now - query.began, work, agreement)
        query.future.set_result(found)
        self._end(number, query, query.outcome, now, 1)
        self.metrics.answered(query.outcome, found.seconds)

    def fail(self, number: int, reason: str) -> None:
        """End a query with an error."""
        query = self.get(number)
        if query is None or query.future.done():
            return
        error, more = QueryFailed(reason), query.named
        if late := reason == DEADLINE:
            at = ", ".join(map(str, query.workers))
            where = f"at worker {at}" if at else "no worker was free"
            error = DeadlinePassed(reason, query.failure, where)
            more["at"] = query.workers
        self._failed_with(number, query, error, "deadline" if late else "failed", **more)

    def refuse(self, number: int, reason: str) -> None:
        """End a query on whose input the model fails."""
        query = self.get(number)
        if query is not None and not query.future.done():
            error = InputRefused(f"the model fails on this input: {reason}")
            self._failed_with(number, query, error, "failed", **query.named)

    def _failed_with(
        self, number: int, query: InFlightQuery, error: QueryFailed, counted: str, **more: Any
    ) -> None:
        query.future.set_exception(error)
        now = time.monotonic()
        self._end(number, query, "failed", now)
        self.metrics.ended(counted, now - query.began)
        self._failed.log("query failed", logging.WARNING, query=number, reason=str(error), **more)

    def cancel(self, queries: Iterable[int]) -> None:
        """End those that are unanswered."""
        now = time.monotonic()
        for number in queries:
            if (query := self.get(number)) is not None:
                if not query.future.done():
                    query.future.set_exception(Cancelled())
                self._end(number, query, "cancelled", now)
                self.metrics.ended("cancelled", now - query.began)

    def _end(
        self, number: int, query: InFlightQuery, outcome: str, now: float, answers: int = 0
    ) -> None:
        del self[number]
        self.admission.note(now, len(self), answers)
        if query.trace is not None:
            query.trace.outcomes[outcome] += 1
