"""Calls of workers: what they are sent, and what the scheduler hears of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from codedinvnet.common.errors import described
from codedinvnet.net.logs import Quiet
from codedinvnet.scheduler.actions import Send
from codedinvnet.scheduler.events import (
    Completed,
    Event,
    Failed,
    Gone,
    Released,
    WorkerLost,
    WorkerUp,
)
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.serving.queries import InFlight
from codedinvnet.serving.served import Payload, TensorCodec
from codedinvnet.serving.tracing import Tracing
from codedinvnet.serving.workers.pool import InputRefused, Result, Task, WorkerDied, WorkerFailed
from codedinvnet.serving.workers.supervisor import MOST_FAILURES, Cause, Supervisor


class InFlightCall(NamedTuple):
    """A call of a worker: one task, or several data tasks that are computed together."""

    worker: int
    task: Task
    members: tuple[int, ...]
    """The queries that it needs."""
    attempts: tuple[int, ...]
    began: float
    kind: str
    """`data` or `parity`."""


class Calls:
    """Gives workers their tasks, and tells the scheduler what becomes of them."""

    def __init__(
        self,
        scheduler: Scheduler,
        supervisor: Supervisor,
        codec: TensorCodec,
        queries: InFlight,
        feed: Callable[[Event], None],
        heard: Callable[[float], None],
    ) -> None:
        self.scheduler, self.supervisor, self.codec = scheduler, supervisor, codec
        self.queries, self._feed, self._heard = queries, feed, heard
        self.metrics = supervisor.metrics
        self.tracing: Tracing | None = None
        self.payloads: dict[int, Payload] = {}
        """Query -> what it asks, until it is over."""
        self.outputs: dict[int, Payload] = {}
        """Attempt -> what its worker sent."""
        code = scheduler.offered
        self._k = 1 if code is None else code.k  # from this number on tasks are parities
        self._quiet = Quiet()
        self.stopped = False
        """Whether lost workers are not replaced any more."""

    def begin(self, sends: Sequence[Send]) -> None:
        """Give a worker a task, or several data tasks in one call."""
        first, now = sends[0], time.monotonic()
        members = tuple([number for send in sends for number in send.members])
        payloads = [self.payloads[number] for number in members]
        inputs = self.codec.join(payloads, first.size if len(sends) == 1 else len(payloads))
        origins = self.queries.sent(members, first.worker)
        task = Task(first.attempt, first.task, inputs, () if first.group_size else origins)
        kind = "parity" if first.task >= self._k else "data"
        self.supervisor.workers[first.worker].tasks += len(sends)
        self.metrics.tasks.labels(kind).inc(len(sends))
        if first.task == self._k:
            self.metrics.groups.labels(str(first.group_size)).inc()
        attempts = tuple(send.attempt for send in sends)
        call = InFlightCall(first.worker, task, members, attempts, now, kind)
        result = self.supervisor.pool.call(first.worker, task)
        if self.tracing is not None:
            requests = [q.trace for q in map(self.queries.get, members) if q is not None]
            where = (kind, first.worker, first.task, members, requests)
            result = self.tracing.attempt(result, *where)
        asyncio.ensure_future(result).add_done_callback(partial(self._ended, call))

    def _ended(
        self, call: InFlightCall, future: asyncio.Future[Result], was_held: bool = False
    ) -> None:
        """Take what became of a call, and tell the scheduler; an answer may be held back first."""
        try:
            results = self.codec.split(call.task, future.result(), len(call.attempts))
        except (Exception, asyncio.CancelledError) as error:
            self._failed(call, error)
            return
        first, now = results[0], time.monotonic()
        if not was_held:
            self._heard(call.began)
            self.supervisor.workers[call.worker].worked()
            self.metrics.worker_time.labels(call.kind).observe(first.seconds)
            self.metrics.recent.call(now - call.began)
            if call.kind == "parity":
                self.metrics.encode_time.observe(first.encode_seconds)
            if first.held > 0:
                for attempt in call.attempts:
                    self._feed(Released(call.worker, attempt))
                loop = asyncio.get_running_loop()
                loop.call_later(first.held, self._ended, call, future, True)
                return
        for attempt, result in zip(call.attempts, results, strict=True):
            self.outputs[attempt] = result.outputs
            self._feed(Completed(attempt))

    def _failed(self, call: InFlightCall, error: BaseException) -> None:
        """Take a call that has no results; its worker may be lost by that."""
        at_it, reason = self.scheduler.is_at(call.worker, call.task.attempt), str(error)
        if isinstance(error, WorkerDied):
            if at_it:
                self.lose_worker(Cause.DIED, call.worker, reason)
        else:
            if isinstance(error, WorkerFailed):
                self._quiet.log("task failed", logging.WARNING, worker=call.worker, reason=reason)
            else:  # its own mistake, no hang
                pool, reason = type(self.supervisor.pool).__name__, described(error)
                about: dict[str, Any] = {"pool": pool, "worker": call.worker, "reason": reason}
                self._quiet.log("the pool raised", logging.ERROR, error=error, **about)
            self._heard(call.began)
            self.metrics.task_failures.labels(str(call.worker)).inc(len(call.attempts))
            if self._is_inputs_own(call, error):
                self.queries.refuse(call.members[0], reason)
                self._feed(Gone(call.members))
            elif at_it and self.supervisor.is_broken(call.worker, call.members):
                why = f"failed {MOST_FAILURES} tasks in a row: {reason}"
                self.lose_worker(Cause.FAILING, call.worker, why)
        if call.kind == "data":
            self.queries.failed(call.members, reason)
        for attempt in call.attempts:
            self._feed(Failed(attempt, reason))

    def _is_inputs_own(self, call: InFlightCall, error: BaseException) -> bool:
        """Return whether the input of a data task is to blame for its failure.

        A worker may have said so. Otherwise two workers that have done tasks have failed on it,
        and on nothing else since.
        """
        if call.kind != "data" or len(call.attempts) > 1:
            return False
        query, workers = self.queries.get(call.members[0]), self.supervisor.workers
        if query is None:
            return False
        query.failed_at.add(call.worker)
        return isinstance(error, InputRefused) or (
            len(query.failed_at) > 1
            and all(
                workers[at].has_worked and set(workers[at].failed) <= {call.members}
                for at in query.failed_at
            )
        )

    def lose_worker(self, cause: Cause, worker: int, reason: str) -> None:
        """Have a worker replaced; what it had to do is lost."""
        self.supervisor.lost(worker, cause)
        self._feed(WorkerLost(worker, reason))

    async def replace(self, worker: int, reason: str) -> None:
        """Replace a worker, and tell the scheduler when it is up again."""
        self._resize()
        if not self.stopped and await self.supervisor.replace(worker, reason):
            self._feed(WorkerUp(worker))
            self._resize()

    def _resize(self) -> None:
        self.queries.admission.resize(self.scheduler.slots_up)
