"""The front end: joins the rules, a worker pool and the decoder.

Requests come in as batches of images, every query ends in one answer or one error. Nothing here
decides anything: `Scheduler` does. Heads and decoding run in one thread of their own, in batches:
what has come in while the last batch was computed is the next.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.serving.actions import (
    DEADLINE,
    Action,
    Answer,
    AnswerDecoded,
    Complete,
    Decode,
    Fail,
    Forget,
    Replace,
    Send,
)
from codedinvnet.serving.admission import Admission
from codedinvnet.serving.decoding import Job, check_group, compute_apart
from codedinvnet.serving.group import FILLER
from codedinvnet.serving.metrics import Metrics, Quiet, log_event
from codedinvnet.serving.pool import Origin, Result, Task, WorkerDied, WorkerFailed, WorkerPool
from codedinvnet.serving.rules import Rules
from codedinvnet.serving.scheduler import OVERTIME, Scheduler
from codedinvnet.serving.supervisor import FAILING, MOST_FAILURES, STATES, Supervisor
from codedinvnet.serving.times import Times

CHECKED_SHARE = 0.5
"""Share of the complete groups that live agreement and residuals are measured on, at most."""
WAITING_CHECKS = 4
"""The newest of these that wait until no answer does; older ones are left out."""
STALLED = 0.5
"""A timer that is later than this tells of an event loop that stood still."""
CATCH_UP = 0.01
"""Seconds in which it takes in what has come meanwhile, before anyone is called late."""
SHOWN_GROUPS = 6
"""Groups that the page shows."""
LAG_PERIOD = 0.5
"""Seconds between two looks at the event loop, and at the timer."""
GRACE = 1.0
"""Seconds beyond their deadline for which draining waits for queries."""


class Answered(NamedTuple):
    """One query's answer."""

    probabilities: np.ndarray
    """(classes,) float32."""
    outcome: str
    """`direct`, `decoded`, or `guessed` (decoded from less than determines it)."""
    seconds: float
    work_seconds: float = 0.0
    """Of these, until all that the answer is made of was here: queues and workers. The rest is the
    front end's: heads and decoding."""


class Check(NamedTuple):
    """A complete group, one member of which is to be decoded as if it were missing."""

    size: int
    outputs: dict[int, np.ndarray]
    workers: dict[int, int]
    """Task -> worker."""
    member: int


class QueryFailed(Exception):
    """A query ended without an answer; the message says why."""


class DeadlinePassed(QueryFailed):
    """Its time was over."""


class Overloaded(Exception):
    """Too many queries are waiting; try again later.

    Args:
        seconds: in which those will have been answered.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Starting(Exception):
    """The workers are not ready yet; try again later."""


class Draining(Exception):
    """The service is about to stop."""


@dataclass
class Waiting:
    """A query in progress."""

    began: float
    origin: Origin | None
    future: asyncio.Future[Answered]
    decoded: np.ndarray | None = None
    ready: float = 0.0
    """When all that its answer is made of was here."""
    outcome: str = ""
    """Of this answer."""
    request: str | None = None
    """What its client calls the request, for the log."""


@dataclass
class GroupView:
    """What the page shows of a group."""

    identity: int
    members: list[int]
    images: list[np.ndarray]
    outcomes: dict[int, str] = field(default_factory=dict)


def described(error: BaseException) -> str:
    """Return an error's kind and message."""
    return f"{type(error).__name__}: {error}"


class FrontEnd:
    """The service without its network face.

    Args:
        scheme: for heads and decoding; workers load their own.
        pool: not yet started.
        rules: see `Rules`.
        image_shape: (C, H, W) of a query.
        deadline: seconds until a query is guessed or fails, unless its request says less.
        min_confidence: decoded answers below it are checked by a copy, if the policy has copies.
        down_timeout: seconds without any worker after which the service is no longer live.
        metrics: where to count.
        seed: of the sample of groups that are checked.

    Raises:
        ValueError: if the rules do not fit the code.
    """

    def __init__(
        self,
        scheme: Scheme,
        pool: WorkerPool,
        rules: Rules,
        image_shape: tuple[int, int, int],
        *,
        deadline: float = 2.0,
        min_confidence: float = 0.0,
        down_timeout: float = 30.0,
        metrics: Metrics | None = None,
        seed: int = 0,
    ) -> None:
        self.scheme, self.pool, self.rules = scheme, pool, rules
        self.deadline, self.min_confidence = deadline, min_confidence
        self.metrics = metrics or Metrics()
        self.metrics.expect(rules.workers, scheme.rules.k)
        self.times = Times(rules.workers)
        self.scheduler = Scheduler(rules, scheme.rules)
        self.admission = Admission(rules.workers, rules.max_pending)
        self.supervisor = Supervisor(pool, rules.workers, self.metrics, down_timeout)
        self.workers = self.supervisor.workers
        self.groups: deque[GroupView] = deque(maxlen=SHOWN_GROUPS)
        self.started = False
        self.draining = False
        self.announced = False
        self.stopped = False
        self._waiting: dict[int, Waiting] = {}
        self._images: dict[int, np.ndarray] = {}
        self._outputs: dict[int, np.ndarray] = {}
        self._jobs: list[Job] = []
        self._checks: deque[Check] = deque(maxlen=WAITING_CHECKS)
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._decoding = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._catching_up = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._random = random.Random(seed)
        self._requests = 0
        self._filler = np.zeros(image_shape, np.uint8)
        self._filler_output = np.zeros(0, np.float32)
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}
        """Of the outputs of parity tasks, by their number and how many images they are of."""
        self._group_of: dict[int, GroupView] = {}
        self._hedges = 0
        """Those that the metrics have."""
        self._failed_queries, self._failed_tasks, self._failed_calls = Quiet(), Quiet(), Quiet()

    # Life

    @property
    def ready(self) -> bool:
        """Whether queries are taken: it has started, is not about to stop, and has workers."""
        return self.started and not self.draining and not self.supervisor.is_down

    async def start(self) -> None:
        """Start the workers, if they do not run yet; returns when all are ready."""
        if self.started:
            return
        self.pool.on_death = self._worker_died
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        self._filler_output = await loop.run_in_executor(self._decoder, self._warm_up)
        await self.supervisor.start()
        self.started = True
        self._spawn(self._watch_loop())
        seconds = round(time.monotonic() - began, 3)
        log_event("ready", workers=self.rules.workers, seconds=seconds)

    def _warm_up(self) -> np.ndarray:
        """Compute a filler's output, its head once, and what shapes parities have."""
        scheme, rules = self.scheme, self.scheme.rules
        k = rules.k

        def output(task: int, members: int) -> Tensor:
            image = torch.from_numpy(self._filler)[None, None]
            return scheme.compute(task, image.expand(-1, members, -1, -1, -1)).output

        own = output(0, len(rules.tasks(k)[0].members))
        if scheme.direct(own) is not None:  # otherwise all outputs are alike
            for size in (k,) if rules.fixed_size else range(1, k + 1):
                parities = {n: len(t.members) for n, t in rules.tasks(size).items() if n >= k}
                for task, members in parities.items():
                    self._shapes[task, members] = tuple(output(task, members)[0].shape)
        return np.asarray(own[0].cpu().numpy())

    def announce_draining(self) -> None:
        """Log, once, that the service is about to stop, and for how many queries it waits."""
        if not self.announced:
            self.announced = True
            log_event("draining", pending=len(self._waiting))

    async def drain(self) -> None:
        """Take no more queries and wait for those that are here, a little beyond the deadline."""
        self.draining = True
        self.announce_draining()
        futures = [waiting.future for waiting in self._waiting.values()]
        if futures:
            await asyncio.wait(futures, timeout=self.deadline + OVERTIME + GRACE)
        left = list(self._waiting)
        for query in left:
            self._fail(Fail(query, "the service stops"))
        self._do(self.scheduler.cancel(left))

    async def stop(self) -> None:
        """Drain, then end the workers; the second time, do nothing."""
        if self.stopped:
            return
        self.stopped = True
        await self.drain()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        await self.pool.stop()
        self._decoder.shutdown(wait=False, cancel_futures=True)
        log_event("stopped")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log_error(error)

    def _log_error(self, error: BaseException) -> None:
        log_event("internal error", logging.ERROR, error, reason=described(error))

    async def _watch_loop(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_PERIOD)
            self.metrics.loop_lag.observe(max(0.0, time.monotonic() - began - LAG_PERIOD))
            self._do(())  # sets a timer that could not be set before

    # Queries

    def check_room(self, images: int, seconds: float | None = None) -> None:
        """Refuse what cannot be taken now.

        Args:
            images: of the batch.
            seconds: that it has; None: the service's deadline.

        Raises:
            Overloaded: if it could not be answered in time; none of it is accepted then.
            Draining: if the service is about to stop.
            Starting: if no worker is ready yet, or again.
        """
        if self.draining:
            raise Draining
        if not self.ready:
            raise Starting
        # Those that wait for nothing but the decoder are over for the rules, but not for us.
        if not self.admission.takes(len(self._waiting), images, seconds or self.deadline):
            self.refuse(images)

    def refuse(self, images: int) -> NoReturn:
        """Count queries as rejected, and raise Overloaded."""
        self.metrics.queries.labels("rejected").inc(images)
        raise Overloaded(self.admission.retry_after(len(self._waiting)))

    async def infer(
        self,
        images: np.ndarray,
        *,
        accept_decoded: bool = True,
        deadline: float | None = None,
        began: float | None = None,
        gone: asyncio.Future[Any] | None = None,
        name: str | None = None,
    ) -> list[Answered | QueryFailed]:
        """Answer a batch of images (B, C, H, W), uint8 or float32 in 0..1.

        Args:
            images: checked by the caller.
            accept_decoded: whether approximate answers will do.
            deadline: seconds; at most the service's own.
            began: when they are counted from (`time.monotonic()`); None: now.
            gone: done as soon as the caller no longer waits; what is unanswered is then cancelled,
                as it is when this call is.
            name: of the request, for the log.

        Returns:
            For each image its answer, or why there is none.

        Raises:
            Overloaded: see `check_room`.
            Draining, Starting: likewise.
        """
        now = time.monotonic()
        limit = (now if began is None else began) + min(self.deadline, deadline or self.deadline)
        self.check_room(len(images), limit - now if limit > now else None)
        if limit <= now:  # nothing is computed for what is answered with an error
            self.metrics.queries.labels("deadline").inc(len(images))
            return [DeadlinePassed(DEADLINE) for _ in images]
        taken = self.scheduler.submit(now, len(images), limit, accept_decoded)
        if taken is None:
            self.refuse(len(images))
        numbers, actions = taken
        loop = asyncio.get_running_loop()
        futures = []
        self._requests += 1
        try:
            for position, (number, image) in enumerate(zip(numbers, images, strict=True)):
                self._images[number] = image
                origin = Origin(self._requests, position, len(images))
                waiting = Waiting(now, origin, loop.create_future(), request=name)
                self._waiting[number] = waiting
                futures.append(waiting.future)
                self._show(number, image)
        except BaseException:  # the rules have them already
            self._do(actions)
            self._cancel(numbers)
            raise
        self.admission.note(now, len(self._waiting))
        self._do(actions)

        def cancel(_: object = None) -> None:
            self._cancel(numbers)

        if gone is not None:
            gone.add_done_callback(cancel)
        try:
            found = await asyncio.gather(*futures, return_exceptions=True)
        except asyncio.CancelledError:
            cancel()
            raise
        finally:
            if gone is not None:
                gone.remove_done_callback(cancel)
        return found  # type: ignore[return-value]

    def _cancel(self, queries: Sequence[int]) -> None:
        """End those of a batch that are unanswered, and have nothing more done for them."""
        for query in queries:
            if (waiting := self._waiting.pop(query, None)) is None:
                continue
            if not waiting.future.done():
                waiting.future.set_exception(QueryFailed("cancelled"))
            self.metrics.queries.labels("cancelled").inc()
            self._note(query, "cancelled")
        self._do(self.scheduler.cancel(queries))

    def _show(self, number: int, image: np.ndarray) -> None:
        """Note the query in the group that the page shows."""
        query = self.scheduler.queries.get(number)
        if query is None or self.scheduler.code.k == 1:
            return
        view = self._group_of.get(query.group.identity)
        if view is None:
            view = GroupView(query.group.identity, [], [])
            if len(self.groups) == SHOWN_GROUPS:
                self._group_of.pop(self.groups[0].identity, None)
            self.groups.append(view)
            self._group_of[view.identity] = view
        view.members.append(number)
        view.images.append(image)

    # Actions

    def _do(self, actions: Sequence[Action]) -> None:
        """Carry out what the rules say, and set the clock for what they want next.

        The queries of an action that cannot be carried out end with the reason.
        """
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            try:
                self._carry_out(action)
            except Exception as error:
                self._log_error(error)
                queue.extend(self._give_up(action, described(error)))
        try:
            if (self._jobs or self._checks) and not self._decoding:
                self._spawn(self._decode_jobs())
                self._decoding = True
            self._set_timer()
        except Exception as error:  # the watch tries again
            self._log_error(error)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action)
        elif isinstance(action, Answer):
            output = self._outputs[action.attempt]
            self._jobs.append(Job(0, {0: output}, {action.query: 0}))
            self._make_ready((action.query,), "direct")
        elif isinstance(action, Decode):
            outputs = {task: self._output(a) for task, a in action.outputs.items()}
            self._jobs.append(Job(action.size, outputs, action.wanted))
            self._make_ready(action.wanted, "guessed" if action.guess else "decoded")
        elif isinstance(action, AnswerDecoded):
            waiting = self._waiting.get(action.query)
            if waiting is not None and waiting.decoded is not None:
                self._answer(action.query, waiting.decoded)
        elif isinstance(action, Fail):
            self._fail(action)
        elif isinstance(action, Replace):
            self._spawn(self._replace(action.worker, action.reason))
        elif isinstance(action, Complete):
            self._check(action)
        elif isinstance(action, Forget):
            for attempt in action.attempts:
                self._outputs.pop(attempt, None)
            for query in action.queries:
                self._images.pop(query, None)

    def _give_up(self, action: Action, reason: str) -> list[Action]:
        """End the queries of an action that was not carried out; return what the rules say."""
        now = time.monotonic()
        actions: list[Action] = []
        if isinstance(action, Send):
            if action.size == 1:
                self._fail(Fail(action.members[0], reason))
                actions += self.scheduler.cancel(action.members)
            actions += self.scheduler.failed(now, action.attempt, reason)
        elif isinstance(action, Decode):
            for query in action.wanted:
                self._fail(Fail(query, reason))
                actions += self.scheduler.decoded(now, query, True)
        elif isinstance(action, Answer | AnswerDecoded | Fail):
            self._fail(Fail(action.query, reason))
        elif isinstance(action, Replace):
            asyncio.get_running_loop().call_later(LAG_PERIOD, self._do, [action])
        return actions

    def _make_ready(self, queries: Iterable[int], outcome: str) -> None:
        now = time.monotonic()
        for query in queries:
            if (waiting := self._waiting.get(query)) is not None:
                waiting.ready, waiting.outcome = now, outcome

    def _output(self, attempt: int) -> np.ndarray:
        return self._filler_output if attempt == FILLER else self._outputs[attempt]

    def _set_timer(self) -> None:
        at = self.scheduler.next_timer()
        if at is None or (self._timer_at is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_at = None
        delay = max(0.0, at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)
        self._timer_at = at

    def _on_timer(self) -> None:
        now, due = time.monotonic(), self._timer_at
        if due is not None and now - due > STALLED and not self._catching_up:
            # Answers may lie in the sockets: without them, busy workers would be taken for hung.
            self._catching_up = True
            self._timer = asyncio.get_running_loop().call_later(CATCH_UP, self._on_timer)
            return
        self._catching_up = False
        self._timer = self._timer_at = None
        self._do(self.scheduler.on_timer(now))

    def _send(self, action: Send) -> None:
        images = [self._images[query] for query in action.members]
        images += [self._filler] * (action.size - len(images))
        floats = any(image.dtype != np.uint8 for image in images)
        if floats:
            images = [i if i.dtype != np.uint8 else i.astype(np.float32) / 255 for i in images]
        waiting = self._waiting.get(action.members[0]) if action.size == 1 else None
        origin = None
        if waiting is not None:  # of its first sending: a copy meets a fate of its own
            origin, waiting.origin = waiting.origin, None
        task = Task(action.attempt, action.task, np.stack(images), origin)
        self.workers[action.worker].tasks += 1
        if action.task == self.scheme.rules.k:
            self.metrics.groups.labels(str(action.size)).inc()
        self._spawn(self._call(action.worker, task, action.members, time.monotonic()))

    async def _call(self, worker: int, task: Task, members: tuple[int, ...], began: float) -> None:
        kind = "parity" if task.number >= self.scheme.rules.k else "data"
        self.metrics.tasks.labels(kind).inc()
        try:
            result = self._sound(task, await self.pool.call(worker, task))
        except WorkerDied as error:
            if self._is_at(worker, task):
                self._worker_died(worker, str(error))
            self._do(self.scheduler.failed(time.monotonic(), task.attempt, str(error)))
        except WorkerFailed as error:
            self._failed_tasks.log("task failed", logging.WARNING, worker=worker, reason=str(error))
            self._task_failed(worker, task, members, str(error))
        except (Exception, asyncio.CancelledError) as error:
            if self.stopped or getattr(asyncio.current_task(), "cancelling", int)():
                raise
            # The pool's own mistake, which is no sign that the worker hangs.
            told = {"worker": worker, "reason": described(error), "error": error}
            self._failed_calls.log("the pool raised", logging.ERROR, **told)
            self._task_failed(worker, task, members, described(error))
        else:
            self.workers[worker].failed.clear()
            self.metrics.worker_time.labels(kind).observe(result.seconds)
            occupied = time.monotonic() - began
            self.times.trip.add(occupied - result.seconds - result.blocked)
            if kind == "parity":
                self.metrics.encode_time.observe(result.encode_seconds)
                # Otherwise every task encodes, as `service` has it, or none does.
                if self.scheduler.systematic and result.encode_seconds > 0:
                    self.times.encode.add(result.encode_seconds / len(task.images))
            else:
                self.times.service.add(result.seconds)
                self.times.tasks[worker].add(occupied + result.held)
            if result.held > 0:
                self._do(self.scheduler.released(time.monotonic(), worker, task.attempt))
                await asyncio.sleep(result.held)
            self._take(task.attempt, result)

    def _task_failed(self, worker: int, task: Task, members: tuple[int, ...], reason: str) -> None:
        self.metrics.task_failures.labels(str(worker)).inc()
        if self._is_at(worker, task) and self._is_broken(worker, members):
            self._worker_died(worker, f"{FAILING}: {reason}")
        self._do(self.scheduler.failed(time.monotonic(), task.attempt, reason))

    def _is_at(self, worker: int, task: Task) -> bool:
        """Tell whether a worker is at a task; if not, another may be in its place by now."""
        return self.scheduler.is_at(worker, task.attempt)

    def _is_broken(self, worker: int, members: tuple[int, ...]) -> bool:
        """Take a failure to a worker's record; return whether it is the worker that is to blame.

        It is not if the same queries fail elsewhere, too, or if nobody gets anything done.
        """
        failed = self.workers[worker].failed
        if members not in failed:
            failed.append(members)
        others = [view.failed for i, view in enumerate(self.workers) if i != worker]
        alone = not any(queries in other for other in others for queries in failed)
        return len(failed) == MOST_FAILURES and alone and not all(others)

    def _sound(self, task: Task, result: Result) -> Result:
        """Return a result that can be decoded together with others'.

        Raises:
            WorkerFailed: if it cannot.
        """
        output = result.output
        shape = self._shapes.get((task.number, len(task.images)), self._filler_output.shape)
        if output.shape != shape:
            raise WorkerFailed(
                f"its output has shape {output.shape}, not {shape}: it may have another bundle"
            )
        if not np.isfinite(output).all():
            raise WorkerFailed("its output is not finite")
        return result

    def _take(self, attempt: int, result: Result) -> None:
        self._outputs[attempt] = result.output
        known = attempt in self.scheduler.attempts
        self._do(self.scheduler.result(time.monotonic(), attempt))
        if not known:
            self._outputs.pop(attempt, None)

    def _unanswered(self, query: int) -> Waiting | None:
        """Return a query that is about to end; None if nobody waits for it.

        One whose caller has just been cancelled is left for `_cancel`, which counts it.
        """
        waiting = self._waiting.get(query)
        return None if waiting is None or waiting.future.done() else waiting

    def _answer(self, query: int, probabilities: np.ndarray) -> None:
        if (waiting := self._unanswered(query)) is None:
            return
        now = time.monotonic()
        seconds = now - waiting.began
        work = waiting.ready - waiting.began
        waiting.future.set_result(Answered(probabilities, waiting.outcome, seconds, work))
        del self._waiting[query]
        self.admission.note(now, len(self._waiting), 1)
        self.metrics.answered(waiting.outcome, seconds)
        self._note(query, waiting.outcome)

    def _fail(self, action: Fail) -> None:
        if (waiting := self._unanswered(action.query)) is None:
            return
        late = action.reason == DEADLINE
        kind = DeadlinePassed if late else QueryFailed
        waiting.future.set_exception(kind(action.reason))
        del self._waiting[action.query]
        self.metrics.queries.labels("deadline" if late else "failed").inc()
        self._note(action.query, "failed")
        told = {} if waiting.request is None else {"id": waiting.request}
        self._failed_queries.log(
            "query failed", logging.WARNING, query=action.query, reason=action.reason, **told
        )

    def _note(self, query: int, outcome: str) -> None:
        for view in self.groups:
            if query in view.members:
                view.outcomes[query] = outcome

    # Workers

    def _worker_died(self, worker: int, reason: str) -> None:
        self._do(self.scheduler.worker_lost(time.monotonic(), worker, reason))

    async def _replace(self, worker: int, reason: str) -> None:
        if await self.supervisor.replace(worker, reason):
            self._do(self.scheduler.worker_up(time.monotonic(), worker))

    # Heads and decoding

    async def _decode_jobs(self) -> None:
        """Compute what waits, answers first, until nothing does."""
        loop = asyncio.get_running_loop()
        try:
            while self._jobs or self._checks:
                if not self._jobs:
                    await self._run_check(self._checks.popleft())
                    continue
                jobs, self._jobs = self._jobs, []
                began = time.perf_counter()
                answers: Sequence[dict[int, np.ndarray] | Exception]
                try:
                    answers = await loop.run_in_executor(
                        self._decoder, compute_apart, self.scheme, jobs
                    )
                except Exception as error:
                    answers = [error] * len(jobs)
                self.metrics.decode_time.observe(time.perf_counter() - began)
                for job, found in zip(jobs, answers, strict=True):
                    if isinstance(found, Exception):
                        self._decoding_failed(job.wanted, described(found))
                        continue
                    for query, probabilities in found.items():
                        # A worker's output may be finite and too large for the heads.
                        if not np.isfinite(probabilities).all():
                            self._decoding_failed((query,), "the result is not finite")
                        elif job.size == 0:
                            self._answer(query, probabilities)
                        else:
                            self._decoded(query, probabilities)
        finally:
            self._decoding = False

    def _decoding_failed(self, queries: Iterable[int], reason: str) -> None:
        """End queries that were to be answered: nobody may wait for them for ever."""
        for query in queries:
            self._fail(Fail(query, f"decoding failed: {reason}"))
            # Over for the rules, too; those answered directly they know no more.
            self._do(self.scheduler.decoded(time.monotonic(), query, True))

    def _decoded(self, query: int, probabilities: np.ndarray) -> None:
        waiting = self._waiting.get(query)
        if waiting is not None:
            waiting.decoded = probabilities
        sure = bool(probabilities.max() >= self.min_confidence)
        self._do(self.scheduler.decoded(time.monotonic(), query, sure))

    # Free checks

    def _check(self, action: Complete) -> None:
        """Have one member of some complete groups decoded as if it were missing."""
        if self._random.random() >= CHECKED_SHARE:
            return
        outputs = {task: self._output(a) for task, a in action.outputs.items()}
        workers = dict(action.workers)
        members = [task for task in workers if task < action.size]  # a filler proves nothing
        if not members:
            return
        self._checks.append(Check(action.size, outputs, workers, self._random.choice(members)))

    async def _run_check(self, check: Check) -> None:
        loop = asyncio.get_running_loop()
        try:
            agrees, residual = await loop.run_in_executor(
                self._decoder, check_group, self.scheme, check.outputs, check.size, check.member
            )
        except Exception as error:  # answers wait behind it
            self._log_error(error)
            return
        if agrees is not None:
            self.metrics.checked(agrees)
        if residual is not None:
            for task, worker in check.workers.items():
                role = "parity" if task >= self.scheme.rules.k else "data"
                self.metrics.residual_seen(worker, role, residual)

    # Views

    def update_gauges(self) -> None:
        """Set the gauges that are read off, not counted."""
        scheduler, metrics = self.scheduler, self.metrics
        metrics.queue_depth.set(scheduler.waiting)
        metrics.pending.set(len(self._waiting))
        metrics.hedges.inc(scheduler.hedges - self._hedges)
        self._hedges = scheduler.hedges
        metrics.asyncio_tasks.set(len(asyncio.all_tasks()))
        states = [view.state for view in self.workers]
        for state in STATES:
            metrics.workers.labels(state).set(states.count(state))
