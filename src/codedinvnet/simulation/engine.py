"""The simulation: a clock, imagined workers, and the service's own rules.

The scheduler and its driver are those of the service. A task keeps its worker busy for a drawn time
instead of a forward pass. This module makes no decisions of its own.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from codedinvnet.codes.registry import find_method
from codedinvnet.codes.rules import CodeRules, Task
from codedinvnet.common.distributions import uniforms
from codedinvnet.common.progress import Progress
from codedinvnet.driver import Driver
from codedinvnet.scheduler.actions import Answer, Compare, Decided, Decode, Send
from codedinvnet.scheduler.events import (
    Completed,
    Decoded,
    Event,
    Failed,
    Released,
    Submit,
    TimerDue,
    WorkerLost,
    WorkerUp,
)
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.tuning import TUNING, Tuning
from codedinvnet.simulation.clock import Clock
from codedinvnet.simulation.injector import FaultInjector, Source
from codedinvnet.simulation.scenario import Scenario

PROGRESS_STEP = 2000
"""Requests between two movements of the progress bar."""
ATTEMPTS = 1 << 40
"""Attempts that a scheduler numbers before it would use another's numbers."""


class Work(NamedTuple):
    """A call on its way through a worker.

    Attributes:
        gateway: that sent it.
        worker: which one.
        life: of the worker; it is forgotten when another takes its place.
        attempts: that it answers.
        queries: that a fault of a request may hit.
        computing: seconds.
    """

    gateway: int
    worker: int
    life: int
    attempts: tuple[int, ...]
    queries: tuple[int, ...]
    computing: float


@dataclass
class Records:
    """What became of every request, in the order of arrival, and what it took.

    Attributes:
        latency: (requests,) seconds until the last answer; infinite if one is missing.
        decoded: (requests,) decoded answers.
        missing: (requests,) queries without an answer.
        sizes: (requests,) images.
        seconds: from the start to the last arrival.
        busy: seconds that workers were busy until then.
        computing: seconds of computing in all tasks, without trips and stragglers.
        tasks: sent to workers.
        hedges: copies of late queries.
        replaced: workers.
        complete: False if the simulation was stopped early.
    """

    latency: np.ndarray
    decoded: np.ndarray
    missing: np.ndarray
    sizes: np.ndarray
    seconds: float
    busy: float
    computing: float
    tasks: int
    hedges: int
    replaced: int
    complete: bool


class Simulation:
    """One run of a scenario.

    Arrivals, times and stragglers come from generators of their own, so that policies that are
    compared with the same seed meet the same arrivals (common random numbers).

    Args:
        scenario: what to simulate.
        limit: (seconds, count): stop as soon as more than `count` requests took longer, the first
            ones, which `warmup` leaves out, not counted.
        tuning: the scheduler's numbers.
    """

    def __init__(
        self,
        scenario: Scenario,
        limit: tuple[float, int] | None = None,
        tuning: Tuning = TUNING,
    ) -> None:
        self.scenario = scenario
        rules = replace(scenario.rules, tuning=tuning)
        self._delay = None if scenario.message_ms is None else scenario.message_ms / 1000
        count = scenario.gateways if self._delay is None else 1
        self.schedulers = [Scheduler(rules, scenario.code) for _ in range(count)]
        for index, scheduler in enumerate(self.schedulers):
            scheduler.flying.count = index * ATTEMPTS
        self._drivers = [Driver(scheduler, self, self) for scheduler in self.schedulers]
        encodes = find_method(scenario.method).encodes
        self._specs = _specs(self.schedulers[0].dispatcher.code, encodes)
        self.clock = Clock()
        self.requests = scenario.requests
        self._limit, self._late = limit, 0
        self._first = self.requests - scenario.counted

        seeds = np.random.SeedSequence(scenario.seed).spawn(9)
        generators = [np.random.default_rng(seed) for seed in seeds]
        drawn = scenario.arrivals.draw(generators[0], self.requests)
        self._arrivals, self._sizes = (values.tolist() for values in drawn)
        self._service = scenario.service.stream(generators[1])
        self._encode = scenario.encode.stream(generators[2])
        self._trip = scenario.trip.stream(generators[3])
        self._front_end = scenario.front_end.stream(generators[4])
        self._decode = scenario.decode.stream(generators[5])
        self._restart = scenario.restart.stream(generators[6])
        self._chance = uniforms(generators[7])
        self._gateways = generators[8].integers(scenario.gateways, size=self.requests).tolist()
        faults = np.random.SeedSequence([scenario.seed, 1])
        self._injector = FaultInjector(scenario.stragglers, scenario.workers, faults)

        self._request_of: dict[int, int] = {}
        """Unanswered query -> its request."""
        self._gateway_of: list[int] = []
        """Of each query, where its client is."""
        self._long: set[int] = set()
        """Unanswered queries that take long on any worker."""
        self._queries = 0
        """How many were submitted."""
        self._left = list(self._sizes)
        self._latency = [0.0] * self.requests
        self._decoded = [0] * self.requests
        self._missing = [0] * self.requests
        self._lives = [0] * scenario.workers
        """Of each worker, how often it was replaced."""
        self._began: list[dict[int, float]] = [{} for _ in range(scenario.workers)]
        """Of each worker, when it began each attempt that it is at."""
        self._waiting: list[deque[Work]] = [deque() for _ in range(scenario.workers)]
        """Of each worker with cores, what waits there for one."""
        self._open = self.requests
        self._over = False
        self._timer_at = math.inf
        self._busy = self._computing = 0.0
        self._seconds = 0.0
        self._bar: Any = None

    def run(self, progress: bool = False) -> Records:
        """Simulate until every request has come to its end; return what became of them."""
        self._bar = Progress(
            total=self.requests,
            desc=f"{self.scenario.name}, {self.scenario.policy}",
            unit="request",
            disable=not progress,
            dynamic_ncols=True,
        )
        with self._bar, _without_collector():
            self.clock.after(self._arrivals[0], self._arrive, 0)
            for burst in self._injector.bursts:
                self.clock.after(next(burst.gaps), self._burst, burst)
            while not self._over:
                self.clock.step()
            self._bar.update(self.requests - self._open - self._bar.n)
        return Records(
            latency=np.array(self._latency),
            decoded=np.array(self._decoded),
            missing=np.array(self._missing),
            sizes=np.array(self._sizes),
            seconds=self._seconds or self.clock.now,
            busy=self._busy,
            computing=self._computing,
            tasks=sum(scheduler.dispatcher.sent for scheduler in self.schedulers),
            hedges=sum(scheduler.dispatcher.hedges for scheduler in self.schedulers),
            replaced=sum(self._lives),
            complete=self._open == 0,
        )

    # Load

    def _arrive(self, request: int) -> None:
        scenario, now, batch = self.scenario, self.clock.now, self._sizes[request]
        if request % PROGRESS_STEP == 0 and request:
            self._bar.update(PROGRESS_STEP)
        if len(self._request_of) + batch > scenario.rules.max_pending:  # refused: no answer
            self._missing[request] = batch
            self._latency[request] = math.inf
            self._close(request)
        else:
            numbers = tuple(range(self._queries, self._queries + batch))
            self._queries += batch
            for number in numbers:
                self._request_of[number] = request
                self._gateway_of.append(self._gateways[request])
                if scenario.long_share and next(self._chance) < scenario.long_share:
                    self._long.add(number)
            self._injector.arrive(numbers)
            self._latency[request] = -now
            submit = Submit(numbers, now + scenario.deadline_ms / 1000)
            self._feed(submit, self._gateways[request])
        if request + 1 < self.requests:
            self.clock.after(self._arrivals[request + 1] - now, self._arrive, request + 1)
        else:
            self._seconds = now
            self._settle_accounts()

    def _settle_accounts(self) -> None:
        """Count, at the last arrival, how long workers have been at what they do."""
        now = self.clock.now
        self._busy += sum(now - began for running in self._began for began in running.values())

    # Actions

    def _feed(self, event: Event, gateway: int = 0) -> None:
        """Feed an event to a gateway's scheduler, or to the one that the first has for all."""
        if self._delay is None:
            self._drivers[gateway].feed(self.clock.now, event)
        elif gateway == 0:
            self._drivers[0].feed(self.clock.now, event)
        else:
            self.clock.after(self._delay, self._feed, event)

    def set_timer(self, at: float | None) -> None:
        """Set the clock for what the scheduler wants next."""
        if at is not None and at < self._timer_at:
            self._timer_at = at
            self.clock.after(at - self.clock.now, self._on_timer, at)

    def _on_timer(self, at: float) -> None:
        if at == self._timer_at:  # otherwise an earlier one took its place
            self._timer_at = math.inf
            for driver in self._drivers:
                driver.feed(max(at, self.clock.now), TimerDue())

    def broken(self, error: Exception) -> str:
        """Stop: an action that cannot be carried out is a mistake here."""
        raise error

    def begin(self, sends: Sequence[Send]) -> None:
        """Have a task's gateway send it to a worker, or several that it computes in one call."""
        gateway = self._gateway_of[sends[0].members[0]]
        if self._delay is None or gateway == 0:
            self._begin_at(gateway, sends)
        else:
            self.clock.after(self._delay, self._receive, gateway, sends)

    def _receive(self, gateway: int, sends: Sequence[Send]) -> None:
        """The scheduler's message is here; the query's answer may have crossed it."""
        (send,) = sends
        if send.members[0] in self._request_of:
            self._begin_at(gateway, sends)
        else:
            self._feed(Failed(send.attempt, "it is not needed"), gateway)

    def _begin_at(self, gateway: int, sends: Sequence[Send]) -> None:
        first = sends[0]
        if len(sends) > 1:
            attempts = tuple(send.attempt for send in sends)
            computing = next(self._service) * self.scenario.call_cost(len(attempts))
            queries = tuple(query for send in sends for query in send.members)
            self._start(gateway, first.worker, attempts, queries, computing)
            return
        spec = self._specs[first.task, first.size]
        computing = next(self._service) * spec.cost
        if first.members[0] in self._long:
            computing *= self.scenario.long
        if spec.encoded:
            computing += next(self._encode) * first.size
        queries = () if first.group_size else first.members
        self._start(gateway, first.worker, (first.attempt,), queries, computing)

    def _start(
        self,
        gateway: int,
        worker: int,
        attempts: tuple[int, ...],
        queries: tuple[int, ...],
        computing: float,
    ) -> None:
        """Send a call to a worker."""
        self._computing += computing
        work = Work(gateway, worker, self._lives[worker], attempts, queries, computing)
        if self.scenario.cores is None:
            self._begin(work, next(self._trip))
        else:
            self.clock.after(next(self._trip) / 2, self._reach, work)

    def _reach(self, work: Work) -> None:
        """Have a server with cores compute a request, or queue it."""
        if len(self._began[work.worker]) < self.scenario.at_once:
            self._begin(work, 0.0)
        else:
            self._waiting[work.worker].append(work)

    def _begin(self, work: Work, trip: float) -> None:
        """Let a worker begin a call, which faults may hit."""
        effect = self._injector.effect(work.worker, work.queries, self.clock.now)
        self._began[work.worker][work.attempts[0]] = self.clock.now
        if effect is None:
            self.clock.after(work.computing + trip, self._done, work, 0.0)
        elif effect.crashes:
            self.clock.after(0.0, self._crash, work.worker, work.life)
        elif not effect.hangs:
            busy = work.computing * effect.factor + effect.blocked + trip
            self.clock.after(busy, self._done, work, effect.held)

    def _done(self, work: Work, held: float) -> None:
        worker, now = work.worker, self.clock.now
        if work.life != self._lives[worker]:
            return  # it was replaced meanwhile
        began = self._began[worker].pop(work.attempts[0])
        if not self._seconds:
            self._busy += now - began
        if self.scenario.cores is not None:
            self.clock.after(held + next(self._trip) / 2, self._arrived, work)
            if self._waiting[worker]:
                self._begin(self._waiting[worker].popleft(), 0.0)
            return
        for attempt in work.attempts:
            if held > 0:
                self.clock.after(held, self._feed, Completed(attempt))
                self._feed(Released(worker, attempt))
            else:
                self._feed(Completed(attempt))

    def _arrived(self, work: Work) -> None:
        """An answer is at its gateway, which passes it on before the scheduler hears of it."""
        if self._delay is not None and work.queries[0] in self._request_of:
            self._finish(work.queries[0])
        self._feed(Completed(work.attempts[0]), work.gateway)

    def _crash(self, worker: int, life: int) -> None:
        if life == self._lives[worker]:
            self._feed(WorkerLost(worker, "crashed"))

    def replace(self, worker: int, reason: str) -> None:
        """Have another worker in a lost one's place after a while."""
        running = self._began[worker]
        if not self._seconds:
            self._busy += sum(self.clock.now - began for began in running.values())
        running.clear()
        self._lives[worker] += 1
        self.clock.after(next(self._restart), self._up, worker)

    def _up(self, worker: int) -> None:
        self._feed(WorkerUp(worker))

    def decode(self, decode: Decode) -> None:
        """Have answers after the time that decoding takes."""
        queries = [query for query, _ in decode.wanted]
        self.clock.after(next(self._decode), self._decoded_all, queries)

    def _decoded_all(self, queries: Sequence[int]) -> None:
        for query in queries:
            self._feed(Decoded(query))

    # Ends

    def answer(self, answer: Answer) -> None:
        """End a query by a direct answer, unless its gateway has."""
        if self._delay is None:
            self._finish(answer.query)

    def answer_decoded(self, query: int) -> None:
        """End a query by a decoded answer."""
        self._decoded[self._request_of[query]] += 1
        self._finish(query)

    def fail(self, query: int, reason: str) -> None:
        """End a query without an answer."""
        if (request := self._request_of.get(query)) is None:
            return  # its gateway has just answered it
        self._missing[request] += 1
        self._latency[request] = math.inf
        self._finish(query)

    def forget(self, attempts: Sequence[int], queries: Sequence[int]) -> None:
        """Let go of nothing: there are no outputs."""

    def copy_refused(self, query: int, held_out: bool) -> None:
        """Count nothing."""

    def compare(self, compare: Compare) -> None:
        """Compare nothing: it costs no time that anybody waits for."""

    def decided(self, decided: Decided) -> None:
        """Log nothing."""

    def _finish(self, query: int) -> None:
        request = self._request_of.pop(query)
        self._long.discard(query)
        self._left[request] -= 1
        if not self._left[request]:
            self._latency[request] += self.clock.now + next(self._front_end)
            self._close(request)

    def _close(self, request: int) -> None:
        self._open -= 1
        if self._missing[request]:  # one error is the whole request's answer
            batch = self._sizes[request]
            self._missing[request], self._decoded[request] = batch, 0
        if self._limit is not None and request >= self._first:
            seconds, most = self._limit
            self._late += self._latency[request] > seconds
            self._over = self._late > most
        self._over = self._over or not self._open

    # Stragglers that do not wait for a task

    def _burst(self, burst: Source) -> None:
        self._injector.begin(burst, self.clock.now)
        self.clock.after(next(burst.gaps), self._burst, burst)


def _specs(code: CodeRules, encodes: bool) -> dict[tuple[int, int], Task]:
    """Return a code's tasks by their numbers and how many members they need.

    Args:
        code: the rules.
        encodes: whether encoding takes time that is not in the tasks' cost.
    """
    sizes = (code.k,) if code.fixed_size else range(1, code.k + 1)
    tasks = (numbered for size in sizes for numbered in code.tasks(size).items())
    found = {(number, len(task.members)): task for number, task in tasks}
    if not encodes:
        found = {key: task._replace(encoded=False) for key, task in found.items()}
    return {**{(i, 1): Task((i,)) for i in range(code.k)}, **found}


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Switch the search for cyclic garbage off: there is none, and a million timers to look at."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
