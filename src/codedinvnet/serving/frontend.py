"""The front end: joins the rules, a worker pool and the decoder.

Queries come in, each ends in one answer or one error. What is done about them `Scheduler` decides.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from codedinvnet.exhaustive import assert_never
from codedinvnet.serving.alarm import LAG_PERIOD, Alarm, watch
from codedinvnet.serving.answering import answering
from codedinvnet.serving.answers import (
    Answered,
    DeadlinePassed,
    Draining,
    Overloaded,
    QueryFailed,
    Starting,
    described,
)
from codedinvnet.serving.background import Background, log_error
from codedinvnet.serving.choices import Choices
from codedinvnet.serving.decoding import Answerer, Answers, Job, Wiring
from codedinvnet.serving.logs import Quiet, log_event
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.rules.actions import (
    DEADLINE,
    Action,
    Answer,
    AnswerDecoded,
    Call,
    Complete,
    Decided,
    Decode,
    Fail,
    Forget,
    Replace,
    Send,
)
from codedinvnet.serving.rules.admission import Admission
from codedinvnet.serving.rules.group import FILLER
from codedinvnet.serving.rules.scheduler import Scheduler
from codedinvnet.serving.rules.settings import Policy, Rules
from codedinvnet.serving.rules.settling import OVERTIME
from codedinvnet.serving.sent import Sent, split
from codedinvnet.serving.served import Served
from codedinvnet.serving.supervisor import FAILING, Supervisor
from codedinvnet.serving.times import Times
from codedinvnet.serving.views import GroupViews
from codedinvnet.serving.waiting import Waiting, WaitingQueries, ends
from codedinvnet.serving.workers.pool import Origin, Task, WorkerDied, WorkerFailed, WorkerPool
from codedinvnet.serving.workers.result import OUTPUT, Abandoned, Computer, Result

if TYPE_CHECKING:  # a gateway without a code does without PyTorch
    from codedinvnet.codes.base import Scheme
    from codedinvnet.serving.reliance import Reliance

GRACE = 1.0
"""Seconds beyond their deadline for which draining waits for queries."""


class FrontEnd:
    """The service without its network face.

    Args:
        served: the model, as clients see it.
        pool: not yet started.
        rules: see `Rules`.
        scheme: for heads and decoding, as workers load it; or what else answers for others; None:
            workers' outputs are the answers.
        computer: what workers compute with; None without a scheme.
        deadline: seconds until a query is guessed or fails, unless its request says less.
        min_confidence: decoded answers below it are checked by a copy, if the policy has copies.
        down_timeout: seconds without any worker after which the service is no longer live.
        metrics: where to count.
        seed: of the sample of groups that are checked.
        reliance: releases approximate answers and finds wrong workers; None: all are believed.

    Raises:
        ValueError: if the rules do not fit the code.
    """

    def __init__(
        self,
        served: Served,
        pool: WorkerPool,
        rules: Rules,
        scheme: Scheme | Answerer | None = None,
        computer: Computer | None = None,
        *,
        deadline: float = 2.0,
        min_confidence: float = 0.0,
        down_timeout: float = 30.0,
        metrics: Metrics | None = None,
        seed: int = 0,
        reliance: Reliance | None = None,
    ) -> None:
        self.served, self.pool, self.rules = served, pool, rules
        self.outputs, queue = answering(scheme, served)
        self._computer = computer
        self.choices = Choices(scheme, rules.workers, rules.backups)
        self.deadline, self.min_confidence = deadline, min_confidence
        self.metrics = metrics or Metrics()
        code = None if scheme is None else scheme.rules
        self._k = 1 if code is None else code.k  # from this number on tasks are parities
        self.metrics.expect(rules.workers, self._k)
        self.metrics.policy_is(rules.policy.name)
        self.times, self.scheduler = Times(), Scheduler(rules, code)
        self.supervisor = Supervisor(pool, rules.workers, self.metrics, down_timeout, rules.backups)
        self.workers = self.supervisor.workers
        self._background = Background()
        self.groups, self.reliance = GroupViews(), reliance
        told = None if reliance is None else reliance.begin(self.metrics, self._worker_died)
        calls = (self._background.spawn, self._computed, log_error)
        wiring = Wiring(self.metrics, *calls, seed, told)
        self.decoding = None if queue is None else queue(wiring)
        self.started = self.draining = self.announced = self.stopped = self._ending = False
        self.admission = Admission(rules.workers * rules.slots, rules.max_pending)
        self.waiting = WaitingQueries(self.metrics, self.groups, self.admission)
        self._inputs: dict[int, Mapping[str, np.ndarray]] = {}
        """Query -> name -> (1, *shape)."""
        self._outputs: dict[int, Mapping[str, np.ndarray]] = {}
        """Attempt -> what its worker sent."""
        self._alarm = Alarm(lambda now: self._do(self.scheduler.on_timer(now)))
        self._requests, self._failed_tasks, self._failed_calls = 0, Quiet(), Quiet()

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
        began = time.monotonic()
        if self._computer is not None and self.decoding is not None:
            await self.decoding.learn(self.outputs, self._computer)
            self._computer = None  # which may hold a model
        await self.supervisor.start()
        self.started = True
        self._background.spawn(watch(self.metrics.loop_lag, lambda: self._do(())))
        log_event("ready", workers=self.rules.workers, seconds=round(time.monotonic() - began, 3))

    def announce_draining(self) -> None:
        """Log, once, that a started service is about to stop, and for how many queries it waits."""
        if self.started and not self.announced:
            self.announced = True
            log_event("draining", pending=len(self.waiting))

    async def drain(self) -> None:
        """Take no more queries and wait for those that are here, a little beyond the deadline."""
        self.draining = True
        self.announce_draining()
        futures = [waiting.future for waiting in self.waiting.values()]
        if futures:
            await asyncio.wait(futures, timeout=self.deadline + OVERTIME + GRACE)
        left = list(self.waiting)
        for query in left:
            self.waiting.fail(query, "the service stops")
        self._do(self.scheduler.cancel(left))

    async def stop(self) -> None:
        """Drain, then end the workers; the second time, do nothing."""
        if self.stopped:
            return
        self.stopped = True
        await self.drain()
        self._ending = True
        await self._background.stop()
        self._alarm.cancel()
        await self.pool.stop()
        if self.decoding is not None:
            self.decoding.stop()
        if self.started:  # otherwise a line says why it did not start
            log_event("stopped")

    def change_policy(self, policy: Policy) -> None:
        """Go on by another policy of `choices`; see `Scheduler.change_policy`."""
        before = self.scheduler.chosen.name
        self._do(self.scheduler.change_policy(time.monotonic(), policy))
        self.metrics.policy_is(policy.name)
        self.times.traffic.since = time.monotonic()
        log_event("policy changed", policy=policy.name, before=before)

    # Queries

    def check_room(self, queries: int, seconds: float | None = None) -> None:
        """Refuse what cannot be taken now.

        Args:
            queries: of the request.
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
        if not self.admission.takes(len(self.waiting), queries, seconds or self.deadline):
            self.refuse(queries)

    def refuse(self, queries: int) -> NoReturn:
        """Count the queries of a request as rejected, and raise Overloaded."""
        self.metrics.queries.labels("rejected").inc(queries)
        self.times.traffic.refused()
        raise Overloaded(self.admission.retry_after(len(self.waiting)))

    async def infer(
        self,
        queries: Sequence[Mapping[str, np.ndarray]],
        *,
        accept_decoded: bool = True,
        deadline: float | None = None,
        began: float | None = None,
        gone: asyncio.Future[Any] | None = None,
        name: str | None = None,
        limit: float | None = None,
        bulk: int = 0,
    ) -> list[Answered | QueryFailed]:
        """Answer the queries of a request.

        Args:
            queries: each has name -> (1, *shape) of every input, checked by the caller.
            accept_decoded: whether approximate answers will do.
            deadline: seconds; at most the service's own.
            began: when they are counted from (`time.monotonic()`); None: now.
            gone: done once nobody waits; that cancels what is unanswered, as ending this call does.
            name: of the request, for the log.
            limit: on disagreement, if the request has one.
            bulk: how large each query is, as a class, where they differ.

        Returns:
            For each query its answer, or why there is none.

        Raises:
            Overloaded, Draining, Starting: see `check_room`.
        """
        now = time.monotonic()
        until = (now if began is None else began) + min(self.deadline, deadline or self.deadline)
        self.check_room(len(queries), until - now if until > now else None)
        if until <= now:  # nothing is computed for what is answered with an error
            self.metrics.queries.labels("deadline").inc(len(queries))
            return [DeadlinePassed(DEADLINE) for _ in queries]
        taken = self.scheduler.submit(now, len(queries), until, accept_decoded, bulk)
        if taken is None:
            self.refuse(len(queries))
        numbers, actions = taken
        loop = asyncio.get_running_loop()
        futures = []
        self._requests += 1
        try:
            for position, (number, inputs) in enumerate(zip(numbers, queries, strict=True)):
                self._inputs[number] = inputs
                origin = Origin(self._requests, position, len(queries))
                futures.append(loop.create_future())
                self.waiting[number] = Waiting(now, origin, futures[-1], request=name, limit=limit)
                self.groups.show(self.scheduler.queries.get(number), inputs)
        except BaseException:  # the rules have them already
            self._do(actions)
            self._cancel(numbers)
            raise
        self.admission.note(now, len(self.waiting))
        self._do(actions)
        ending = ends(futures, lambda: self._cancel(numbers), gone)
        return await self.times.traffic.follow(now, ending, 0.0 if began is None else now - began)

    def _cancel(self, queries: Sequence[int]) -> None:
        """End those of a batch that are unanswered, and have nothing more done for them."""
        self.waiting.cancel(queries)
        self._do(self.scheduler.cancel(queries))

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
                log_error(error)
                queue.extend(self._give_up(action, described(error)))
        self.admission.resize(self.scheduler.binding.slots_up)
        try:
            if self.decoding is not None:
                self.decoding.run()
            self._alarm.set(self.scheduler.next_timer())
        except Exception as error:  # the watch tries again
            log_error(error)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send((action,))
        elif isinstance(action, Call):
            self._send(action.sends)
        elif isinstance(action, Answer):
            self.waiting.made_ready((action.query,), "direct")
            if self.reliance is not None:
                self.reliance.answered(action.worker, self.waiting.get(action.query))
            outputs = self._outputs[action.attempt]
            if self.decoding is None or OUTPUT not in outputs:
                self.waiting.answer(action.query, outputs)
            else:
                self.decoding.add(Job(0, self._mixed({0: action.attempt}), {action.query: 0}))
        elif isinstance(action, Forget):
            for attempt in action.attempts:
                self._outputs.pop(attempt, None)
            for query in action.queries:
                self._inputs.pop(query, None)
        elif isinstance(action, Decode):
            assert self.decoding is not None
            self.decoding.add(Job(action.size, self._mixed(action.outputs), action.wanted))
            self.waiting.made_ready(action.wanted, "guessed" if action.guess else "decoded")
        elif isinstance(action, AnswerDecoded):
            waiting = self.waiting.get(action.query)
            if waiting is not None and waiting.decoded is not None:
                self.waiting.answer(action.query, waiting.decoded.outputs)
        elif isinstance(action, Fail):
            self.waiting.fail(action.query, action.reason)
        elif isinstance(action, Replace):
            self._background.spawn(self._replace(action.worker, action.reason))
        elif isinstance(action, Complete):
            if self.decoding is not None:
                self.decoding.offer(action.size, self._mixed(action.outputs), action.workers)
        elif isinstance(action, Decided):
            self.metrics.decided(action.decision)
        else:
            assert_never(action)

    def _give_up(self, action: Action, reason: str) -> list[Action]:
        """End the queries of an action that was not carried out; return what the rules say."""
        now = time.monotonic()
        actions: list[Action] = []
        if isinstance(action, Call):
            return [one for send in action.sends for one in self._give_up(send, reason)]
        if isinstance(action, Send):
            if not action.group_size:
                self.waiting.fail(action.members[0], reason)
                actions += self.scheduler.cancel(action.members)
            actions += self.scheduler.failed(now, action.attempt, reason)
        elif isinstance(action, Decode):
            for query in action.wanted:
                self.waiting.fail(query, reason)
                actions += self.scheduler.decoded(now, query, True)
        elif isinstance(action, Answer | AnswerDecoded | Fail):
            self.waiting.fail(action.query, reason)
        elif isinstance(action, Replace):
            asyncio.get_running_loop().call_later(LAG_PERIOD, self._do, [action])
        return actions

    def _mixed(self, attempts: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Return what a code gets of tasks' attempts."""
        filler, mixed = self.outputs.filler_output, self.outputs.mixed
        return {t: filler if a == FILLER else mixed(self._outputs[a]) for t, a in attempts.items()}

    def _send(self, sends: Sequence[Send]) -> None:
        """Give a worker a task, or several data tasks in one call."""
        first = sends[0]
        members = tuple(query for send in sends for query in send.members)
        inputs = self.outputs.joined([self._inputs[query] for query in members], first.size)
        origins = () if first.group_size else self.waiting.origins(members)
        until = max(self.scheduler.wanted_until(send.attempt) for send in sends)
        task = Task(first.attempt, first.task, inputs, origins, until)
        self.workers[first.worker].tasks += len(sends)
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
            if self.scheduler.is_at(worker, task.attempt):
                self._worker_died(worker, str(error))
            self._lose(attempts, str(error))
        except WorkerFailed as error:
            self._failed_tasks.log("task failed", logging.WARNING, worker=worker, reason=str(error))
            self._task_failed(sent, str(error), error.final)
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
            self.workers[worker].failed.clear()
            self.metrics.worker_time.labels(kind).observe(result.seconds)
            occupied = time.monotonic() - sent.began
            if kind == "parity":
                self.metrics.encode_time.observe(result.encode_seconds)
                how = (worker, task.members, self.scheduler.systematic)
                self.times.add_parity(result, occupied, *how)
            elif len(attempts) == 1:  # what larger calls take says nothing of one task
                self.times.add_data(result, occupied, worker)
            if result.held > 0:
                for attempt in attempts:
                    self._do(self.scheduler.released(time.monotonic(), worker, attempt))
                await asyncio.sleep(result.held)
            for attempt, each in zip(attempts, own, strict=True):
                self._take(attempt, each)

    def _task_failed(self, sent: Sent, reason: str, final: bool = False) -> None:
        self._alarm.heard(sent.began)
        self.metrics.task_failures.labels(str(sent.worker)).inc()
        at_it = self.scheduler.is_at(sent.worker, sent.task.attempt)
        if final:  # before the loss of its worker lets it be sent again
            self._lose(sent.attempts, reason, final)
        if at_it and self.supervisor.is_broken(sent.worker, sent.members):
            self._worker_died(sent.worker, f"{FAILING}: {reason}")
        self._lose(sent.attempts, reason)

    def _lose(self, attempts: Sequence[int], reason: str, final: bool = False) -> None:
        for attempt in attempts:
            self._do(self.scheduler.failed(time.monotonic(), attempt, reason, final))

    def _take(self, attempt: int, result: Result) -> None:
        if attempt in self.scheduler.attempts:
            self._outputs[attempt] = result.outputs
        self._do(self.scheduler.result(time.monotonic(), attempt))

    def late(self, attempt: int) -> None:
        """Take note that an attempt is late, though nobody may know what is normal for its kind."""
        self._do(self.scheduler.late(time.monotonic(), attempt))

    # Workers

    def _worker_died(self, worker: int, reason: str) -> None:
        self.supervisor.gone(worker, reason)
        self._do(self.scheduler.worker_lost(time.monotonic(), worker, reason))

    async def _replace(self, worker: int, reason: str) -> None:
        if await self.supervisor.replace(worker, reason):
            self._do(self.scheduler.worker_up(time.monotonic(), worker))

    # Heads and decoding

    def _computed(self, job: Job, answers: Answers | Exception) -> None:
        """Take what was found for a job's queries."""
        for query in job.wanted:
            found = answers if isinstance(answers, Exception) else answers[query]
            waiting, trusted = self.waiting.get(query), self.reliance
            if isinstance(found, Exception):
                self._decoding_failed(job, query, described(found))
            # A worker's output may be finite and too large for the heads.
            elif not math.isfinite(found.confidence):
                self._decoding_failed(job, query, "the result is not finite")
            elif job.size == 0:
                self.waiting.answer(query, found.outputs)
            elif trusted is not None and not trusted.releases(found, job.size, waiting):
                self._do(self.scheduler.withheld(time.monotonic(), query))
            else:
                if waiting is not None:
                    waiting.decoded = found
                sure = found.confidence >= self.min_confidence
                self._do(self.scheduler.decoded(time.monotonic(), query, sure))

    def _decoding_failed(self, job: Job, query: int, reason: str) -> None:
        """Let a late query wait for its own answer; end one that has none to wait for."""
        if job.size and self.scheduler.systematic:
            self.waiting.not_decoded(query, reason)
            self._do(self.scheduler.withheld(time.monotonic(), query))
        else:
            self.waiting.fail(query, f"decoding failed: {reason}")
            # Over for the rules, too; those answered directly they know no more.
            self._do(self.scheduler.decoded(time.monotonic(), query, True))

    def update_gauges(self) -> None:
        """Set the gauges that are read off, not counted."""
        self.metrics.read_off(self.scheduler, len(self.waiting))
        self.supervisor.update_gauges()
