"""Upstreams behind a scheduler: servers that queue what they are given, and a round trip away.

Each upstream works on one request at a time, first come, first served, like a model server with one
worker. What the scheduler sends arrives half a round trip later, and so does the answer. No request
is taken back: the loser of a race is computed to its end. `Queue` does what HAProxy does with
`leastconn` and `maxconn`: one line, and the upstream with the fewest requests.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from codedinvnet.scheduler.actions import Action, Answer, Fail, Send
from codedinvnet.scheduler.events import Completed, Event, Submit, TimerDue
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules

SERVICE = 0.010
"""Seconds that a request normally takes."""
BLOCKED, SHAPE, MOST_BLOCKED = 0.13, 1.5, 2.0
"""Of a server that a request blocks: the least seconds, the tail's exponent, and the most."""
WARM_UP = 0.1
"""Share of the requests, the first ones, that is not looked at."""

Fault = Literal["none", "block", "slow", "held", "exponential", "long", "half-long", "all-slow"]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        fault: "block": one request of a hundred blocks its server; "slow": the first upstream takes
            10 times as long; "held": one answer of a hundred comes 0.8 seconds late; "long": a
            tenth of the requests takes `length` times as long on any server; "half-long": for half
            of these a copy takes the normal time; "all-slow": for 5 of every 20 seconds each server
            takes 4 times as long.
        busy: the requests' own work in what the upstreams can do, without faults.
    """

    fault: Fault = "none"
    busy: float = 0.4
    policy: str = "hedge"
    slots: int | None = 1
    upstreams: int = 8
    requests: int = 8000
    seed: int = 1
    round_trip: float = 0.001
    cores: int = 1
    """How many requests an upstream works on at once."""
    length: float = 10.0
    """How many times as long the long requests take."""


class Rival(Protocol):
    """What can be driven."""

    def handle(self, now: float, event: Event) -> list[Action]: ...
    def next_timer(self) -> float | None: ...


class Queue:
    """One line; a request goes to the upstream with the fewest requests and a free slot."""

    def __init__(self, upstreams: int, slots: int) -> None:
        self._slots, self._loads = slots, [0] * upstreams
        self._line: deque[int] = deque()
        self._at: dict[int, int] = {}
        self._turn = 0

    def handle(self, now: float, event: Event) -> list[Action]:
        if isinstance(event, Submit):
            self._line.extend(event.queries)
            return self._begin()
        assert isinstance(event, Completed)
        worker = self._at.pop(event.attempt)
        self._loads[worker] -= 1
        return [Answer(event.attempt, event.attempt, worker), *self._begin()]

    def next_timer(self) -> float | None:
        return None

    def _begin(self) -> list[Action]:
        sends: list[Action] = []
        count = len(self._loads)
        while self._line:
            worker = min(range(count), key=lambda i: (self._loads[i], (i - self._turn) % count))
            if self._loads[worker] >= self._slots:
                break
            self._turn = worker + 1
            self._loads[worker] += 1
            query = self._line.popleft()
            self._at[query] = worker
            sends.append(Send(worker, query, 0, (query,), 1))
        return sends


@dataclass
class Upstream:
    """A server."""

    line: deque[tuple[int, float]] = field(default_factory=deque)
    """Attempts and how long each keeps it busy."""
    working: int = 0
    busy: float = 0.0


@dataclass
class Found:
    """What a run shows: seconds of each request, and of work for each second of requests' own."""

    seconds: list[float]
    work: float

    def quantile(self, share: float) -> float:
        """Return a quantile in milliseconds."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def row(self) -> tuple[float, ...]:
        """p50, p90, p99 and p99.9 in ms, and the work."""
        return (*(round(self.quantile(q), 1) for q in (0.5, 0.9, 0.99, 0.999)), round(self.work, 3))


class Run:
    """Drives a scheduler through a cell."""

    def __init__(self, cell: Cell, scheduler: Rival | None = None, **rules: Any) -> None:
        self.cell = cell
        if scheduler is None and cell.policy == "queue":
            scheduler = Queue(cell.upstreams, cell.slots or cell.cores + 1)
        own = {"hang_timeout": 1e3, "slots": cell.slots, "max_pending": 10**9, **rules}
        self.scheduler = scheduler or Scheduler(Rules(cell.upstreams, POLICIES[cell.policy], **own))
        self.now, self._order, self._timer = 0.0, 0, float("inf")
        self._events: list[tuple[float, int, Callable[..., None], Sequence[Any]]] = []
        self._arrivals, self._times, self._faults = (
            random.Random(f"{cell.seed} {name}") for name in ("arrivals", "times", "faults")
        )
        self._upstreams = [Upstream() for _ in range(cell.upstreams)]
        self._came: dict[int, float] = {}
        self._own: dict[int, list[float]] = {}
        """Query -> what its attempts take, the first and any other."""
        self._seconds: list[float] = []
        self._asked = self._done = 0.0

    def run(self) -> Found:
        self._arrive(0)
        while self._events and len(self._seconds) < self.cell.requests:
            self.now, _, act, given = heapq.heappop(self._events)
            act(*given)
        counted = self._seconds[int(WARM_UP * len(self._seconds)) :]
        return Found(counted, sum(each.busy for each in self._upstreams) / self._asked)

    def _after(self, seconds: float, act: Callable[..., None], *given: Any) -> None:
        self._order += 1
        heapq.heappush(self._events, (self.now + seconds, self._order, act, given))

    def _arrive(self, number: int) -> None:
        cell = self.cell
        first = other = SERVICE * self._times.lognormvariate(0.0, 0.03)
        if cell.fault == "exponential":
            first, other = (SERVICE * self._times.expovariate(1.0) for _ in range(2))
        elif cell.fault in ("long", "half-long") and self._faults.random() < 0.1:
            first *= cell.length
            short = cell.fault == "half-long" and self._faults.random() < 0.5
            other *= 1.0 if short else cell.length
        self._came[number], self._own[number] = self.now, [first, other]
        self._asked += first
        self._do(self.scheduler.handle(self.now, Submit((number,), self.now + 1e4)))
        if number + 1 < cell.requests:
            scale = 0.9 + cell.length / 10 if cell.fault in ("long", "half-long") else 1.0
            rate = cell.busy * cell.upstreams * cell.cores / (SERVICE * scale)
            self._after(self._arrivals.expovariate(rate), self._arrive, number + 1)

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._send(action)
            elif isinstance(action, Answer | Fail):
                self._seconds.append(self.now - self._came.pop(action.query))
        at = self.scheduler.next_timer()
        if at is not None and at < self._timer:
            self._timer = at
            self._after(max(0.0, at - self.now), self._on_timer, at)

    def _on_timer(self, at: float) -> None:
        if at == self._timer:
            self._timer = float("inf")
            self._do(self.scheduler.handle(max(at, self.now), TimerDue()))

    def _send(self, action: Send) -> None:
        times = self._own[action.members[0]]
        takes = times.pop(0) if len(times) > 1 else times[0]
        fault = self.cell.fault
        if fault == "block" and self._faults.random() < 0.01:
            takes += min(MOST_BLOCKED, BLOCKED * self._faults.paretovariate(SHAPE))
        elif (fault == "slow" and action.worker == 0) or (
            fault == "all-slow" and self.now % 20 > 15
        ):
            takes *= 10.0 if fault == "slow" else 4.0
        self._after(self.cell.round_trip / 2, self._reach, action, takes)

    def _reach(self, action: Send, takes: float) -> None:
        upstream = self._upstreams[action.worker]
        upstream.line.append((action.attempt, takes))
        self._work(upstream)

    def _work(self, upstream: Upstream) -> None:
        while upstream.line and upstream.working < self.cell.cores:
            attempt, takes = upstream.line.popleft()
            upstream.working += 1
            upstream.busy += takes
            self._after(takes, self._finish, upstream, attempt)

    def _finish(self, upstream: Upstream, attempt: int) -> None:
        upstream.working -= 1
        held = self.cell.fault == "held" and self._faults.random() < 0.01
        self._after(self.cell.round_trip / 2 + 0.8 * held, self._answer, attempt)
        self._work(upstream)

    def _answer(self, attempt: int) -> None:
        self._do(self.scheduler.handle(self.now, Completed(attempt)))
