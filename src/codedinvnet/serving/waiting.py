"""Queries in progress: each ends once, with an answer or an error, and is counted then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codedinvnet.scheduler.actions import DEADLINE
from codedinvnet.scheduler.admission import Admission
from codedinvnet.serving.answers import Answered, DeadlinePassed, QueryFailed
from codedinvnet.serving.decoding import Found
from codedinvnet.serving.logs import Quiet
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.tracing import RequestSpan, Tracing, current_request
from codedinvnet.serving.views import GroupViews
from codedinvnet.serving.workers.pool import Names, Origin, Task
from codedinvnet.serving.workers.result import Result


@dataclass
class Waiting:
    """A query in progress."""

    began: float
    origin: Origin | None
    future: asyncio.Future[Answered]
    decoded: Found | None = None
    """The approximate answer, once there is one."""
    agreement: float | None = None
    """The calibrated probability that it agrees; None without a calibration."""
    ready: float = 0.0
    """When all that its answer is made of was here."""
    outcome: str = ""
    """Of this answer."""
    request: str | None = None
    """What its client calls the request, for the log."""
    limit: float | None = None
    """The limit on disagreement that the request asks for."""
    failure: str = ""
    """Why a worker had no answer to it, the last time."""
    at: list[int | str] = field(default_factory=list)
    """Who was given a task for it, by `Names.of`, in that order."""
    trace: RequestSpan | None = field(default_factory=current_request)
    """The span of its request, if that is traced."""


class WaitingQueries(dict[int, Waiting]):
    """The queries in progress by their numbers.

    Args:
        metrics: where their ends are counted.
        groups: where the page finds them.
        admission: is told of answers, and of queries that end without one.
        names: what workers are called.
    """

    def __init__(
        self, metrics: Metrics, groups: GroupViews, admission: Admission, names: Names
    ) -> None:
        super().__init__()
        self.metrics, self.groups, self.admission, self.names = metrics, groups, admission, names
        self.tracing: Tracing | None = None
        """Traces every task that is for them."""
        self._failed, self._undecoded = Quiet(), Quiet()

    def traced(
        self,
        call: Awaitable[Result],
        worker: int,
        task: Task,
        queries: tuple[int, ...],
        kind: str,
    ) -> Awaitable[Result]:
        """Return a call of a worker, which is traced if its queries are."""
        if self.tracing is None:
            return call
        waiting = (self.get(query) for query in queries)
        requests = [None if found is None else found.trace for found in waiting]
        return self.tracing.attempt(call, kind, worker, task.number, queries, requests)

    def origins(self, queries: Iterable[int]) -> tuple[Origin, ...]:
        """Return the origins of queries that are sent for the first time.

        Later they have none: a copy meets a fate of its own.
        """
        found = []
        for query in queries:
            waiting = self.get(query)
            if waiting is not None and waiting.origin is not None:
                found.append(waiting.origin)
                waiting.origin = None
        return tuple(found)

    def given(self, queries: Iterable[int], worker: int) -> None:
        """Take down that a worker gets a task for queries."""
        name = self.names.of(worker)
        for query in queries:
            if (waiting := self.get(query)) is not None:
                waiting.at.append(name)

    def made_ready(self, queries: Iterable[int], outcome: str) -> None:
        """Take down that all is here that their answers are made of."""
        now = time.monotonic()
        for query in queries:
            if (waiting := self.get(query)) is not None:
                waiting.ready, waiting.outcome = now, outcome

    def answer(self, query: int, outputs: Mapping[str, np.ndarray]) -> None:
        """End a query with an answer."""
        if (waiting := self._unanswered(query)) is None:
            return
        now = time.monotonic()
        seconds = now - waiting.began
        work = waiting.ready - waiting.began
        agreement = None if waiting.outcome == "direct" else waiting.agreement
        waiting.future.set_result(Answered(outputs, waiting.outcome, seconds, work, agreement))
        del self[query]
        self.admission.note(now, len(self), 1)
        self.metrics.answered(waiting.outcome, seconds)
        self._note(query, waiting, waiting.outcome)

    def fail(self, query: int, reason: str) -> None:
        """End a query with an error."""
        if (waiting := self._unanswered(query)) is None:
            return
        told: dict[str, Any] = {} if waiting.request is None else {"id": waiting.request}
        error = QueryFailed(reason)
        if late := reason == DEADLINE:
            told["at"] = waiting.at
            error = DeadlinePassed(reason, waiting.failure, self._where(waiting))
        waiting.future.set_exception(error)
        del self[query]
        now = time.monotonic()
        self.admission.note(now, len(self))
        self.metrics.ended("deadline" if late else "failed", now - waiting.began)
        self._note(query, waiting, "failed")
        self._failed.log("query failed", logging.WARNING, query=query, reason=str(error), **told)

    def _where(self, waiting: Waiting) -> str:
        """Tell who was given a query."""
        if not waiting.at:
            return f"no {self.names.kind} was free"
        return f"at {self.names.kind} {', '.join(map(str, waiting.at))}"

    def failed(self, queries: Iterable[int], reason: str) -> None:
        """Take down why a worker had no answer to queries; others may have."""
        for query in queries:
            if (waiting := self.get(query)) is not None:
                waiting.failure = reason

    def not_decoded(self, query: int, reason: str) -> None:
        """Log why a query that may get its own answer gets no decoded one."""
        waiting = self.get(query)
        told = {} if waiting is None or waiting.request is None else {"id": waiting.request}
        self._undecoded.log("decoding failed", logging.WARNING, query=query, reason=reason, **told)

    def cancel(self, queries: Iterable[int]) -> None:
        """End those that are unanswered."""
        now = time.monotonic()
        for query in queries:
            if (waiting := self.pop(query, None)) is None:
                continue
            if not waiting.future.done():
                waiting.future.set_exception(QueryFailed("cancelled"))
            self.metrics.ended("cancelled", now - waiting.began)
            self._note(query, waiting, "cancelled")
        self.admission.note(now, len(self))

    def _note(self, query: int, waiting: Waiting, outcome: str) -> None:
        """Show how a query ended, on the page and in its request's trace."""
        self.groups.note(query, outcome)
        if waiting.trace is not None:
            waiting.trace.outcomes[outcome] += 1

    def _unanswered(self, query: int) -> Waiting | None:
        """Return a query that is about to end; None if nobody waits for it.

        One whose caller has just been cancelled is left for `cancel`, which counts it.
        """
        waiting = self.get(query)
        return None if waiting is None or waiting.future.done() else waiting


async def ends(
    futures: Sequence[asyncio.Future[Answered]],
    cancel: Callable[[], None],
    gone: asyncio.Future[Any] | None = None,
) -> list[Answered | QueryFailed]:
    """Wait for all queries of a request, and return how each ended.

    Args:
        futures: of the queries.
        cancel: called when nobody waits for them any more: this call is cancelled, or `gone` done.
        gone: see `FrontEnd.infer`.
    """

    def left(_: object) -> None:
        cancel()

    if gone is not None:
        gone.add_done_callback(left)
    found: list[Answered | QueryFailed] = []
    try:
        for future in futures:
            try:
                found.append(await future)
            except QueryFailed as error:
                found.append(error)
    except asyncio.CancelledError:
        for future in futures:
            future.cancel()
        cancel()
        raise
    finally:
        if gone is not None:
            gone.remove_done_callback(left)
    return found
