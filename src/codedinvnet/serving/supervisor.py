"""Starts lost workers again, and tells how long none has been up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field

from codedinvnet.errors import UserError
from codedinvnet.serving.logs import Lasting, log_event
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.workers.pool import SILENT, WorkerPool

RESTART_DELAYS = (0.0, 0.0, 0.5, 1.0, 2.0, 5.0)
"""Seconds before a worker is started again, by its deaths in a row."""
STEADY = 10.0
"""A worker that lived so long starts with a clean record."""
SOON = 1.0
"""Seconds without a worker for which queries are still taken, unless a start has failed."""
MOST_STARTS = 10
"""A worker is given up when a user's mistake has kept it from starting so often in a row."""
MOST_FAILURES = 5
"""A worker that fails so many tasks in a row is replaced, if they are not to blame."""
STARTING, UP, HUNG, DOWN, GIVEN_UP, ABSENT = STATES = (
    "starting", "up", "hung", "down", "abandoned", "absent",
)  # fmt: skip
"""The states of a worker: it is starting before it was up for the first time."""
NOBODY_THERE = "it is not among the upstreams"
"""The reason why a worker is absent that may come later: nothing was lost with it."""
WRONG = "answers wrongly"
"""The reason why a worker is replaced whose answers do not stand up to the code's."""
FAILING = f"failed {MOST_FAILURES} tasks in a row"
"""The reason why a failing worker is replaced."""


@dataclass
class WorkerView:
    """What the page and the metrics show of a worker."""

    state: str = STARTING
    since: float = 0.0
    deaths: int = 0
    restarts: int = 0
    tasks: int = 0
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

    Args:
        pool: their pool.
        size: the number of workers.
        metrics: where replacements are counted.
        down_timeout: seconds without any worker after which the service is no longer live.
        backups: how many of them, the last, compute a small backup's tasks alone.
    """

    def __init__(
        self,
        pool: WorkerPool,
        size: int,
        metrics: Metrics,
        down_timeout: float = 30.0,
        backups: int = 0,
    ) -> None:
        self.pool, self.metrics, self.down_timeout = pool, metrics, down_timeout
        self.mains = size - backups
        self.workers = [WorkerView() for _ in range(size)]
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
        hopeless = all(view.state == GIVEN_UP for view in self.workers)
        return not hopeless and time.monotonic() - self._down_since <= self.down_timeout

    async def start(self) -> None:
        """Start all workers, and return when all are ready, but for those lost meanwhile."""
        await self.pool.start(len(self.workers))
        now = time.monotonic()
        for view in self.workers:
            if view.state == STARTING:
                view.state, view.since = UP, now

    async def replace(self, worker: int, reason: str) -> bool:
        """Start a lost worker again, as often as it takes; return whether it is up."""
        view = self.workers[worker]
        now = time.monotonic()
        view.deaths = view.deaths + 1 if now - view.since < STEADY else 1
        absent = reason == NOBODY_THERE
        is_silent = reason.partition(": ")[2].startswith(SILENT)  # behind an upstream's URL
        kind = "hung" if is_silent else {"hung": "hung", WRONG: "wrong"}.get(reason, "died")
        kind = "failing" if reason.startswith(FAILING) and not is_silent else kind
        view.state = ABSENT if absent else HUNG if kind == "hung" else DOWN
        view.since = now
        view.failed.clear()
        none_left = all(view.state not in (STARTING, UP) for view in self.workers)
        if self._down_since is None and none_left:
            self._down_since, self._start_failed = now, False
            log_event("no worker is up", logging.ERROR)
        if not absent:
            self.metrics.restarts.labels(kind).inc()
            log_event("worker lost", logging.WARNING, worker=worker, reason=reason)
        mistakes, failing = 0, Lasting()
        while True:
            delay = RESTART_DELAYS[min(view.deaths, len(RESTART_DELAYS)) - 1]
            await asyncio.sleep(delay)
            try:
                await self.pool.replace(worker)
                break
            except Exception as error:  # an EOFError of a dying fork server, for one: try again
                view.deaths += 1
                self._start_failed = True
                reason = f"{type(error).__name__}: {error}"
                failing.log("worker did not start", logging.ERROR, reason=reason, worker=worker)
                mistakes = mistakes + 1 if isinstance(error, UserError) else 0
            if mistakes == MOST_STARTS:
                view.state = GIVEN_UP
                log_event("worker given up", logging.ERROR, worker=worker, starts=mistakes)
                return False
        absent = view.state == ABSENT  # perhaps only since it was lost
        view.state, view.since, view.has_worked = UP, time.monotonic(), False
        self._down_since = None
        if not absent:
            view.restarts += 1
        log_event("worker up", worker=worker, seconds=round(view.since - now, 3))
        return True

    def gone(self, worker: int, reason: str) -> None:
        """Take down that the place of a lost worker is empty now: it is absent, not lost.

        Whoever comes there later does not end its loss.
        """
        view = self.workers[worker]
        if reason == NOBODY_THERE and view.state in (HUNG, DOWN):
            view.state, view.since, view.deaths = ABSENT, time.monotonic(), 1

    def is_broken(self, worker: int, members: tuple[int, ...]) -> bool:
        """Take a failure to a worker's record; return whether it is the worker that is to blame.

        It is not if the same queries fail elsewhere, too, or if nobody gets anything done. Who
        has done nothing since it came up is no sign that others could. What a small backup gets
        done says nothing of those that compute the model itself.

        Args:
            worker: its number.
            members: the queries of the task that it failed.
        """
        failed = self.workers[worker].failed
        if members not in failed:
            failed.append(members)
        kin = self.workers[: self.mains] if worker < self.mains else self.workers
        there = (view for view in kin if view.state == UP)
        others = [view for view in there if view is not self.workers[worker]]
        alone = not any(queries in other.failed for other in others for queries in failed)
        sound = any(other.has_worked and not other.failed for other in others)
        return len(failed) == MOST_FAILURES and alone and sound

    def update_gauges(self) -> None:
        """Set how many workers are in which state."""
        states = [view.state for view in self.workers]
        for state in STATES:
            self.metrics.workers.labels(state).set(states.count(state))
