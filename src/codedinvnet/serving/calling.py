"""Calls of workers: what they are sent, and what the rules are told of what became of it.

The lower part of the front end, which carries out what the rules say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from codedinvnet.codes.rules import CodeRules
from codedinvnet.scheduler.actions import Action, Send
from codedinvnet.scheduler.admission import Admission
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.alarm import Alarm
from codedinvnet.serving.answers import described
from codedinvnet.serving.background import Background
from codedinvnet.serving.logs import Quiet
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.recent import Recent
from codedinvnet.serving.sent import Sent, split
from codedinvnet.serving.supervisor import FAILING, Supervisor
from codedinvnet.serving.times import Times
from codedinvnet.serving.views import GroupViews
from codedinvnet.serving.waiting import WaitingQueries
from codedinvnet.serving.workers.pool import Names, Task, WorkerDied, WorkerFailed, WorkerPool
from codedinvnet.serving.workers.result import Abandoned, Result


class Calling(ABC):
    """The workers, and what is between them and the rules.

    Args:
        pool: not yet started.
        outputs: knows what workers send.
        rules: see `Rules`.
        code: the rules of a code; None without one.
        metrics: where to count.
        deadline: see `FrontEnd`.
        down_timeout: likewise.
        names: likewise.

    Raises:
        ValueError: if the rules do not fit the code.
    """

    def __init__(
        self,
        pool: WorkerPool,
        outputs: Outputs,
        rules: Rules,
        code: CodeRules | None,
        metrics: Metrics,
        deadline: float,
        down_timeout: float,
        names: Names,
    ) -> None:
        self.pool, self.outputs, self.rules, self.metrics = pool, outputs, rules, metrics
        self.deadline = deadline
        self._k = 1 if code is None else code.k  # from this number on tasks are parities
        metrics.expect(rules.workers, self._k)
        metrics.policy_is(rules.policy.name)
        self.times, self.recent, self.scheduler = Times(), Recent(), Scheduler(rules, code)
        self.supervisor = Supervisor(pool, rules.workers, metrics, down_timeout, rules.backups)
        self.workers = self.supervisor.workers
        self.admission = Admission(rules.workers * rules.slots, rules.max_pending)
        self.groups = GroupViews(outputs.served.image_shape is not None)
        self.waiting = WaitingQueries(metrics, self.groups, self.admission, names)
        self._inputs: dict[int, Mapping[str, np.ndarray]] = {}
        """Query -> name -> (1, *shape)."""
        self._outputs: dict[int, Mapping[str, np.ndarray]] = {}
        """Attempt -> what its worker sent."""
        self._background = Background()
        self._alarm = Alarm(lambda now: self._do(self.scheduler.on_timer(now)))
        self._failed_tasks, self._failed_calls = Quiet(), Quiet()
        self._ending = False
        """Whether calls are cancelled, as the service stops."""

    @abstractmethod
    def _do(self, actions: Sequence[Action]) -> None:
        """Carry out what the rules say."""

    def _send(self, sends: Sequence[Send]) -> None:
        """Give a worker a task, or several data tasks in one call."""
        first = sends[0]
        members = tuple(query for send in sends for query in send.members)
        inputs = self.outputs.joined([self._inputs[query] for query in members], first.size)
        origins = () if first.group_size else self.waiting.origins(members)
        latest = time.monotonic() + self.rules.group_timeout + self.deadline
        until = max(self.scheduler.flying.wanted_until(send.attempt, latest) for send in sends)
        task = Task(first.attempt, first.task, inputs, origins, until)
        self.workers[first.worker].tasks += len(sends)
        self.waiting.given(members, first.worker)
        if first.task == self._k:
            self.metrics.groups.labels(str(first.group_size)).inc()
        attempts = tuple(send.attempt for send in sends)
        sent = Sent(first.worker, task, members, attempts, time.monotonic())
        self._background.spawn(self._call(sent))

    async def _call(self, sent: Sent) -> None:
        worker, task, attempts = sent.worker, sent.task, sent.attempts
        kind = "parity" if task.number >= self._k else "data"
        self.metrics.tasks.labels(kind).inc(len(attempts))
        try:
            call = self.pool.call(worker, task)
            result = await self.waiting.traced(call, worker, task, sent.members, kind)
            self._alarm.heard(sent.began)
            own = [self.outputs.sound(task, each) for each in split(result, len(attempts))]
        except WorkerDied as error:
            self._note_failure(sent, str(error))
            if self.scheduler.is_at(worker, task.attempt):
                self._worker_died(worker, str(error))
            self._lose(attempts, str(error))
        except WorkerFailed as error:
            self._note_failure(sent, str(error))
            self._failed_tasks.log("task failed", logging.WARNING, worker=worker, reason=str(error))
            self._task_failed(sent, str(error), error.final, error.blamed)
        except Abandoned as error:  # who is slow is known by it all the same
            self._do(self.scheduler.released(time.monotonic(), worker, task.attempt))
            self._lose(attempts, str(error))
        except (Exception, asyncio.CancelledError) as error:
            if self._ending or getattr(asyncio.current_task(), "cancelling", int)():
                raise
            # The pool's own mistake, which is no sign that the worker hangs.
            reason, pool = described(error), type(self.pool).__name__
            told = {"pool": pool, "worker": worker, "reason": reason, "error": error}
            self._failed_calls.log("the pool raised", logging.ERROR, **told)
            self._task_failed(sent, reason)
        else:
            self.workers[worker].worked()
            self.metrics.worker_time.labels(kind).observe(result.seconds)
            occupied = time.monotonic() - sent.began
            if kind == "parity":
                self.metrics.encode_time.observe(result.encode_seconds)
                systematic = self.scheduler.systematic
                self.times.add_parity(result, occupied, task.members, systematic)
                self.recent.task(occupied)
            elif result.is_usual:
                self.recent.task(occupied)
                if len(attempts) == 1:  # a call of several says nothing of one task
                    self.times.add_data(result, occupied)
            if result.held > 0:
                for attempt in attempts:
                    self._do(self.scheduler.released(time.monotonic(), worker, attempt))
                await asyncio.sleep(result.held)
            for attempt, each in zip(attempts, own, strict=True):
                self._take(attempt, each)

    def _task_failed(
        self, sent: Sent, reason: str, final: bool = False, blamed: bool = True
    ) -> None:
        self._alarm.heard(sent.began)
        self.metrics.task_failures.labels(str(sent.worker)).inc(len(sent.attempts))
        at_it = self.scheduler.is_at(sent.worker, sent.task.attempt)
        if final:  # before the loss of its worker lets it be sent again
            self._lose(sent.attempts, reason, final)
        if at_it and blamed and self.supervisor.is_broken(sent.worker, sent.members):
            self._worker_died(sent.worker, f"{FAILING}: {reason}")
        self._lose(sent.attempts, reason)

    def _lose(self, attempts: Sequence[int], reason: str, final: bool = False) -> None:
        for attempt in attempts:
            self._do(self.scheduler.failed(time.monotonic(), attempt, reason, final))

    def _note_failure(self, sent: Sent, reason: str) -> None:
        """Keep why a worker has no answer to queries, for those whose time will be over."""
        if sent.task.number < self._k:
            self.waiting.failed(sent.members, reason)

    def _take(self, attempt: int, result: Result) -> None:
        if attempt in self.scheduler.attempts:
            self._outputs[attempt] = result.outputs
        self._do(self.scheduler.result(time.monotonic(), attempt, result.is_usual))

    def late(self, attempt: int) -> None:
        """Take note that an attempt is late, though nobody may know what is normal for its kind."""
        self._do(self.scheduler.late(time.monotonic(), attempt))

    def _worker_died(self, worker: int, reason: str) -> None:
        self.supervisor.gone(worker, reason)
        self._do(self.scheduler.worker_lost(time.monotonic(), worker, reason))

    async def _replace(self, worker: int, reason: str) -> None:
        if await self.supervisor.replace(worker, reason):
            self._do(self.scheduler.worker_up(time.monotonic(), worker))
