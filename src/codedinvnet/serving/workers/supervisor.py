"""Starts lost workers again, and says how long none has been up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from codedinvnet.common.errors import UserError, described
from codedinvnet.net.logs import Lasting, log_event
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.workers.pool import WorkerPool

RESTART_DELAYS = (0.0, 0.0, 0.5, 1.0, 2.0, 5.0)
"""Seconds before a worker is started again, by its deaths in a row."""
STEADY = 10.0
"""A worker that lived so long starts with a clean record."""
SOON = 1.0
"""Seconds without a worker for which queries are still taken, unless a start has failed."""
MOST_STARTS = 10
"""A worker is given up when a user's mistake has kept it from starting so often in a row."""
MOST_FAILURES = 5
"""A worker that fails so many tasks in a row is replaced, if the tasks are not to blame."""


class State(StrEnum):
    """What a worker is doing."""

    STARTING = "starting"
    """It has not been up yet."""
    UP = "up"
    HUNG = "hung"
    DOWN = "down"
    ABANDONED = "abandoned"
    """It is not started any more."""


class Cause(StrEnum):
    """Why a worker is replaced."""

    DIED = "died"
    HUNG = "hung"
    FAILING = "failing"
    WRONG = "wrong"
    """Its answers do not stand up to the code's."""


@dataclass(eq=False)
class Worker:
    """A worker, as the supervisor, the page and the metrics see it."""

    state: State = State.STARTING
    since: float = 0.0
    """When it came up, or was lost."""
    deaths: int = 0
    """In a row."""
    restarts: int = 0
    tasks: int = 0
    cause: Cause | None = None
    """Why it was lost, if something other than the scheduler noticed."""
    failed: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=MOST_FAILURES))
    """The queries of the last tasks that it failed since it last did one."""
    has_worked: bool = False
    """Whether it has done a task since it came up."""

    def worked(self) -> None:
        """Take down that it has done a task."""
        self.has_worked = True
        self.failed.clear()


class Supervisor:
    """Keeps a pool's workers running.

    Without any worker for `down_timeout` seconds, the service is no longer live.
    """

    def __init__(
        self, pool: WorkerPool, size: int, metrics: Metrics, down_timeout: float = 30.0
    ) -> None:
        self.pool, self.metrics, self.down_timeout = pool, metrics, down_timeout
        self.workers = [Worker() for _ in range(size)]
        self._down_since: float | None = None
        self._start_failed = False
        """Whether a start has failed since the last worker was up."""

    @property
    def is_down(self) -> bool:
        """Whether queries would wait in vain: no worker is up, and none is soon."""
        return self._down_since is not None and (
            self._start_failed or time.monotonic() - self._down_since > SOON
        )

    @property
    def is_live(self) -> bool:
        """Whether a worker is up, or may still come back without a restart of the service."""
        if self._down_since is None:
            return True
        hopeless = all(worker.state is State.ABANDONED for worker in self.workers)
        return not hopeless and time.monotonic() - self._down_since <= self.down_timeout

    async def start(self) -> None:
        """Start all workers, and return when all are ready that are not lost meanwhile."""
        await self.pool.start(len(self.workers))
        now = time.monotonic()
        for worker in self.workers:
            if worker.state is State.STARTING:
                worker.state, worker.since = State.UP, now

    def lost(self, number: int, cause: Cause) -> None:
        """Take down why a worker is lost; `replace` is called for it then."""
        if self.workers[number].state in (State.STARTING, State.UP):
            self.workers[number].cause = cause

    async def replace(self, number: int, reason: str) -> bool:
        """Start a lost worker again, as often as it takes; return whether it is up."""
        worker, now = self.workers[number], time.monotonic()
        cause, worker.cause = worker.cause or Cause.HUNG, None  # the scheduler tells who hangs
        worker.deaths = worker.deaths + 1 if now - worker.since < STEADY else 1
        worker.state = State.HUNG if cause is Cause.HUNG else State.DOWN
        worker.since = now
        worker.failed.clear()
        none_left = all(w.state not in (State.STARTING, State.UP) for w in self.workers)
        if self._down_since is None and none_left:
            self._down_since, self._start_failed = now, False
            log_event("no worker is up", logging.ERROR)
        self.metrics.restarts.labels(cause.value).inc()
        log_event("worker lost", logging.WARNING, worker=number, reason=reason)
        mistakes, failing = 0, Lasting()
        while True:
            delay = RESTART_DELAYS[min(worker.deaths, len(RESTART_DELAYS)) - 1]
            await asyncio.sleep(delay)
            try:
                await self.pool.replace(number)
                break
            except Exception as error:  # an EOFError of a dying fork server, for one: try again
                worker.deaths += 1
                self._start_failed = True
                why = described(error)
                failing.log("worker did not start", logging.ERROR, reason=why, worker=number)
                mistakes = mistakes + 1 if isinstance(error, UserError) else 0
            if mistakes == MOST_STARTS:
                worker.state = State.ABANDONED
                log_event("worker given up", logging.ERROR, worker=number, starts=mistakes)
                return False
        worker.state, worker.since, worker.has_worked = State.UP, time.monotonic(), False
        self._down_since = None
        worker.restarts += 1
        log_event("worker up", worker=number, seconds=round(worker.since - now, 3))
        return True

    def is_broken(self, number: int, members: tuple[int, ...]) -> bool:
        """Take a failure to a worker's record; return whether it is the worker that is to blame.

        It is not if the same queries fail elsewhere, too, or if no worker gets anything done. One
        that has done nothing since it came up is no sign that others could.
        """
        failed = self.workers[number].failed
        if members not in failed:
            failed.append(members)
        others = [
            worker
            for other, worker in enumerate(self.workers)
            if other != number and worker.state is State.UP
        ]
        is_only = not any(queries in other.failed for other in others for queries in failed)
        sound = any(other.has_worked and not other.failed for other in others)
        return len(failed) == MOST_FAILURES and is_only and sound

    def update_gauges(self) -> None:
        """Set how many workers are in which state."""
        states = [worker.state for worker in self.workers]
        for state in State:
            self.metrics.workers.labels(state.value).set(states.count(state))
