"""The front end: joins the rules, a worker pool and the decoder.

Queries come in, each ends in one answer or one error. What is done about them `Scheduler` decides.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from typing_extensions import assert_never

from codedinvnet.scheduler.actions import (
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
from codedinvnet.scheduler.completion import GRACE_PERIOD
from codedinvnet.scheduler.group import FILLER
from codedinvnet.scheduler.policies import Policy
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.alarm import LAG_PERIOD, watch
from codedinvnet.serving.answers import (
    Answered,
    DeadlinePassed,
    Draining,
    NoneUp,
    Overloaded,
    QueryFailed,
    Starting,
    described,
)
from codedinvnet.serving.background import log_error
from codedinvnet.serving.calling import Calling
from codedinvnet.serving.choices import Choices
from codedinvnet.serving.decoding import Answerer, Answers, Decoding, Job, Wiring
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.served import Served
from codedinvnet.serving.waiting import Waiting, ends
from codedinvnet.serving.workers.pool import Names, Origin, WorkerPool
from codedinvnet.serving.workers.result import OUTPUT, Computer

if TYPE_CHECKING:  # a gateway without a code does without PyTorch
    from codedinvnet.codes.base import Scheme
    from codedinvnet.serving.reliance import Reliance

GRACE = 1.0
"""Seconds beyond their deadline for which draining waits for queries."""


class FrontEnd(Calling):
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
        reliance: releases approximate answers and finds wrong workers; None: all are believed.
        names: what clients and operators know workers as.

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
        reliance: Reliance | None = None,
        names: Names | None = None,
    ) -> None:
        outputs, queue = _answering(scheme, served)
        code = None if scheme is None else scheme.rules
        metrics = metrics or Metrics()
        self.names = names or Names()
        super().__init__(pool, outputs, rules, code, metrics, deadline, down_timeout, self.names)
        self.served, self._computer = served, computer
        self.choices = Choices(scheme, rules.workers, rules.backups)
        self.min_confidence, self.reliance = min_confidence, reliance
        told = None if reliance is None else reliance.begin(self.metrics, self._worker_died)
        calls = (self._background.spawn, self._computed, log_error)
        wiring = Wiring(self.metrics, *calls, told)
        self.decoding = None if queue is None else queue(wiring)
        self.started = self.draining = self.announced = self.stopped = False
        self._requests = 0

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
        await asyncio.sleep(0)  # in which the pool tells who is not up
        mains = range(self.supervisor.mains)
        up = sum(map(self.scheduler.is_up, mains))
        there = sum(self.names.of(worker) != "" for worker in mains)
        told: dict[str, Any] = {"up": up, f"{self.names.kind}s": there}
        log_event("ready" if up else "started", **told, seconds=round(time.monotonic() - began, 3))

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
            await asyncio.wait(futures, timeout=self.deadline + GRACE_PERIOD + GRACE)
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
            Starting: if no worker is ready yet.
            NoneUp: if none is any more.
        """
        if not self.ready:
            self.metrics.queries.labels("rejected").inc(queries)
            if self.draining:
                raise Draining
            raise NoneUp(self.names.kind) if self.started else Starting()
        # Those that wait for nothing but the decoder are over for the rules, but not for us.
        seconds = self.deadline if seconds is None else seconds
        if not self.admission.takes(len(self.waiting), queries, seconds):
            self.refuse(queries)

    def refuse(self, queries: int) -> NoReturn:
        """Count the queries of a request as rejected, and raise Overloaded."""
        self.metrics.queries.labels("rejected").inc(queries)
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
            NotNow: see `check_room`.
        """
        now = time.monotonic()
        seconds = self.deadline if deadline is None else min(self.deadline, deadline)
        came = now if began is None else began
        until = came + seconds
        self.check_room(len(queries), until - now if until > now else None)
        if until <= now:  # nothing is computed for what is answered with an error
            for _ in queries:
                self.metrics.ended("deadline", now - came)
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
        found = await ends(futures, lambda: self._cancel(numbers), gone)
        self.recent.request(found, now - came)
        return found

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
        self.admission.resize(self.scheduler.assigner.slots_up)
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
            if not self._ending:
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


def _answering(
    scheme: Scheme | Answerer | None, served: Served
) -> tuple[Outputs, Callable[[Wiring], Decoding] | None]:
    """Return what knows workers' outputs, and what makes answers of them, if anything does."""
    if scheme is None:
        return Outputs(served), None
    if isinstance(scheme, Answerer):
        return scheme.reads(served), scheme.queue
    from codedinvnet.serving.decoder import Decoder  # which needs PyTorch

    return Outputs(served, scheme), partial(Decoder, scheme, served)
