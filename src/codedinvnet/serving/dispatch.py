"""The dispatcher: queries come in, workers compute, and each query ends in an answer or an error.

What is done about a query the scheduler decides; the driver tells it what happened, and has the
dispatcher carry out what it asks for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, NoReturn

import numpy as np

from codedinvnet.common.errors import described
from codedinvnet.driver import Driver
from codedinvnet.net.alarm import Alarm, watch
from codedinvnet.net.background import Background, log_error
from codedinvnet.net.logs import Quiet, log_event
from codedinvnet.scheduler.actions import DEADLINE, Answer, Compare, Decided, Decode, Send
from codedinvnet.scheduler.admission import Admission
from codedinvnet.scheduler.events import (
    Decoded,
    Event,
    Gone,
    PolicyChanged,
    Submit,
    TimerDue,
    Withheld,
)
from codedinvnet.scheduler.policies import Policy
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.answers import Answered, Cancelled, DeadlinePassed, NotNow, QueryFailed
from codedinvnet.serving.calls import Calls
from codedinvnet.serving.decoding import Answers, Decoder, Job
from codedinvnet.serving.gate import AnswerGate
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.queries import InFlight, InFlightQuery
from codedinvnet.serving.served import Payload, TensorCodec
from codedinvnet.serving.workers.pool import Origin, WorkerPool
from codedinvnet.serving.workers.supervisor import Cause, Supervisor

WRONG = "answers wrongly"
"""The reason why a worker is replaced whose answers do not stand up to the code's."""
GRACE = 1.0
"""Seconds beyond their deadline for which draining waits for queries."""


class Timing(NamedTuple):
    """The dispatcher's times, in seconds."""

    deadline: float = 2.0
    """Until a query is guessed or fails, unless its request says less."""
    down_timeout: float = 30.0
    """Without any worker, until the service is no longer live."""


class Dispatcher:
    """The service without its network API.

    Without a decoder, workers' outputs are the answers; without a gate, all approximate answers are
    released.

    Raises:
        ValueError: if the rules do not fit the code.
    """

    def __init__(
        self,
        pool: WorkerPool,
        rules: Rules,
        codec: TensorCodec,
        decoder: Decoder | None = None,
        timing: Timing | None = None,
        gate: AnswerGate | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.pool, self.rules, self.codec, self.decoder = pool, rules, codec, decoder
        self.timing, self.gate = timing or Timing(), gate
        self.metrics = metrics = metrics or Metrics()
        code = None if decoder is None else decoder.scheme.rules
        metrics.expect(rules.workers, 1 if code is None else code.k)
        metrics.policy_is(rules.policy.name)
        self.scheduler = Scheduler(rules, code)
        self.supervisor = Supervisor(pool, rules.workers, metrics, self.timing.down_timeout)
        self.admission = Admission(self.scheduler.slots_up, rules.max_pending)
        self.queries = InFlight(metrics, self.admission)
        self.started = self.draining = self.announced = self.stopped = False
        self.drains: list[Callable[[], None]] = []
        """Called once the service is about to stop."""
        self._requests, self._numbers = 0, count()
        self._background = Background()
        self._driver = Driver(self.scheduler, self, None if decoder is None else self)
        self._alarm = Alarm(lambda now: self._driver.feed(now, TimerDue()))
        self.calls = Calls(
            self.scheduler,
            self.supervisor,
            codec,
            self.queries,
            self._feed,
            self._alarm.heard,
        )
        self._quiet = Quiet()
        if decoder is not None:
            decoder.finished = self._decoded
        if decoder is not None and gate is not None:
            self.queries.direct, decoder.compared = gate.answered, gate.compared
            gate.begin(metrics, partial(self.calls.lose_worker, Cause.WRONG, reason=WRONG))

    # Life

    @property
    def ready(self) -> bool:
        """Whether queries are taken: it has started, is not about to stop, and has workers."""
        return self.started and not self.draining and not self.supervisor.is_down

    @property
    def is_up(self) -> bool:
        """Whether queries are taken, and a worker is up now."""
        return self.ready and self.scheduler.workers_up > 0

    async def start(self) -> None:
        """Start the workers, if they do not run yet; returns when all are ready."""
        if self.started:
            return
        began = time.monotonic()
        self.pool.on_death = partial(self.calls.lose_worker, Cause.DIED)
        if self.decoder is not None:
            await self.decoder.apart(self.codec.learn)
        await self.supervisor.start()
        self.started = True
        self._background.spawn(watch(self.metrics.loop_lag, self._driver.look))
        up, there = self.scheduler.workers_up, self.rules.workers
        log_event("ready", up=up, workers=there, seconds=round(time.monotonic() - began, 3))

    def announce_draining(self) -> None:
        """Log, once, that a started service is about to stop, and for how many queries it waits."""
        if self.started and not self.announced:
            self.announced = True
            log_event("draining", pending=len(self.queries))
            for drain in self.drains:
                drain()

    async def stop(self) -> None:
        """Take no more queries, wait for those that are here, and end the workers."""
        if self.stopped:
            return
        self.stopped = self.draining = self.calls.stopped = True
        self.announce_draining()
        futures = [query.future for query in self.queries.values()]
        if futures:
            await asyncio.wait(futures, timeout=self.timing.deadline + GRACE)
        left = list(self.queries)
        for number in left:
            self.queries.fail(number, "the service stops")
        self._feed(Gone(tuple(left)))
        await self._background.stop()
        self._alarm.cancel()
        await self.pool.stop()
        if self.decoder is not None:
            await self.decoder.stop()
        if self.started:  # otherwise a line says why it did not start
            log_event("stopped")

    def change_policy(self, policy: Policy) -> None:
        """Go on by another policy; see `Scheduler.change_policy`."""
        before = self.scheduler.chosen.name
        self._feed(PolicyChanged(policy.name))
        self.metrics.policy_is(policy.name)
        log_event("policy changed", policy=policy.name, before=before)

    def update_gauges(self) -> None:
        """Set the gauges that are read off, not counted."""
        self.metrics.read_off(self.scheduler, len(self.queries))
        self.supervisor.update_gauges()

    # Queries

    def check_room(self, queries: int, seconds: float | None = None) -> None:
        """Refuse queries that cannot be taken now, or not answered in so many seconds.

        Raises:
            NotNow: if so, or if the service starts or is about to stop, or no worker is up.
        """
        if not self.ready:
            self.metrics.queries.labels("rejected").inc(queries)
            up = "no worker is up" if self.started else "starting"
            raise NotNow("shutting down" if self.draining else up)
        seconds = self.timing.deadline if seconds is None else seconds
        if not self.admission.takes(len(self.queries), queries, seconds):
            self.refuse(queries)

    def refuse(self, queries: int) -> NoReturn:
        """Count the queries of a request as rejected, and raise NotNow."""
        self.metrics.queries.labels("rejected").inc(queries)
        raise NotNow("overloaded", self.admission.refuse(len(self.queries), queries))

    async def infer(
        self,
        payloads: Sequence[Payload],
        *,
        accept_decoded: bool = True,
        deadline: float | None = None,
        began: float | None = None,
        gone: asyncio.Future[Any] | None = None,
        name: str | None = None,
        limit: float | None = None,
    ) -> list[Answered | QueryFailed]:
        """Answer the queries of a request: return for each its answer, or why there is none.

        Args:
            payloads: its queries, checked by the caller.
            accept_decoded: whether approximate answers will do.
            deadline: seconds; at most the service's own.
            began: when they are counted from (`time.monotonic()`); None: now.
            gone: done once the client is gone, which cancels what is unanswered.
            name: of the request, for the log.
            limit: on disagreement, if the request has one.

        Raises:
            NotNow: see `check_room`.
        """
        now, loop = time.monotonic(), asyncio.get_running_loop()
        came = now if began is None else began
        until = came + min(self.timing.deadline, math.inf if deadline is None else deadline)
        self.check_room(len(payloads), until - now if until > now else None)
        if until <= now:  # nothing is computed for what is answered with an error
            for _ in payloads:
                self.metrics.ended("deadline", now - came)
            return [DeadlinePassed(DEADLINE) for _ in payloads]
        numbers = tuple(islice(self._numbers, len(payloads)))
        self._requests += 1
        futures = []
        for place, (number, payload) in enumerate(zip(numbers, payloads, strict=True)):
            self.calls.payloads[number] = payload
            origin = Origin(self._requests, place, len(payloads))
            futures.append(loop.create_future())
            self.queries[number] = InFlightQuery(now, futures[-1], origin, name, limit)
        self.admission.note(now, len(self.queries))
        self._driver.feed(now, Submit(numbers, until, accept_decoded))

        def cancel(_: object = None) -> None:
            self.queries.cancel(numbers)
            self._feed(Gone(numbers))

        found = await ended(futures, cancel, gone)
        if not any(isinstance(answer, Cancelled) for answer in found):
            self.metrics.recent.request(found, now - came)
        return found

    # Events and actions, see `DecodingFrontEnd`

    def _feed(self, event: Event) -> None:
        self._driver.feed(time.monotonic(), event)

    def set_timer(self, at: float | None) -> None:
        try:
            self._alarm.set(at)
        except Exception as error:  # the watch tries again
            log_error(error)

    def broken(self, error: Exception) -> str:
        log_error(error)
        return described(error)

    def begin(self, sends: Sequence[Send]) -> None:
        self.calls.begin(sends)

    def answer(self, answer: Answer) -> None:
        self.queries.answer(answer.query, self.calls.outputs[answer.attempt], answer.worker)

    def fail(self, query: int, reason: str) -> None:
        self.queries.fail(query, reason)

    def replace(self, worker: int, reason: str) -> None:
        self._background.spawn(self.calls.replace(worker, reason))

    def forget(self, attempts: Sequence[int], queries: Sequence[int]) -> None:
        for attempt in attempts:
            self.calls.outputs.pop(attempt, None)
        for number in queries:
            self.calls.payloads.pop(number, None)

    def copy_refused(self, query: int, held_out: bool) -> None:
        """Count nothing."""

    def decided(self, decided: Decided) -> None:
        self.metrics.decided(decided)

    def decode(self, decode: Decode) -> None:
        assert self.decoder is not None
        wanted = dict(decode.wanted)
        self.decoder.add(Job(decode.size, self._gathered(decode.outputs), wanted))
        self.queries.ready(wanted, "guessed" if decode.guess else "decoded")

    def answer_decoded(self, query: int) -> None:
        found = self.queries.get(query)
        if found is not None and found.decoded is not None:
            self.queries.answer(query, found.decoded)

    def compare(self, compare: Compare) -> None:
        if self.decoder is not None:
            outputs = self._gathered(compare.outputs)
            self.decoder.offer(compare.size, outputs, dict(compare.workers))

    def _gathered(self, outputs: Sequence[tuple[int, int]]) -> dict[int, np.ndarray]:
        return self.codec.gathered(dict(outputs), self.calls.outputs)

    # Decoding

    def _decoded(self, job: Job, answers: Answers) -> None:
        """Take what was found for a job's queries."""
        for number in job.wanted:
            found = answers if isinstance(answers, Exception) else answers[number]
            query = self.queries.get(number)
            if isinstance(found, Exception):
                self._not_decoded(number, described(found))
            elif not math.isfinite(found.confidence):  # an output may be too large for the heads
                self._not_decoded(number, "the result is not finite")
            elif self.gate is not None and not self.gate.releases(found, job.size, query):
                self._feed(Withheld(number))
            else:
                if query is not None:
                    query.decoded = found.outputs
                self._feed(Decoded(number))

    def _not_decoded(self, number: int, reason: str) -> None:
        """Let a late query wait for its own answer; end one that has none to wait for."""
        query = self.queries.get(number)
        if self.scheduler.systematic:
            named = {} if query is None else query.named
            about = {"query": number, "reason": reason, **named}
            self._quiet.log("decoding failed", logging.WARNING, **about)
            self._feed(Withheld(number))
        else:
            self.queries.fail(number, f"decoding failed: {reason}")
            self._feed(Decoded(number))


async def ended(
    futures: Sequence[asyncio.Future[Answered]],
    cancel: Callable[[object], None],
    gone: asyncio.Future[Any] | None,
) -> list[Answered | QueryFailed]:
    """Wait for all queries of a request, and return how each ended.

    `cancel` is called when the client is gone: this call is cancelled, or `gone` done.
    """
    if gone is not None:
        gone.add_done_callback(cancel)
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
        cancel(None)
        raise
    finally:
        if gone is not None:
            gone.remove_done_callback(cancel)
    return found
