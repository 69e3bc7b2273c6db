"""The interface of a worker pool.

A pool knows no coding: it runs numbered tasks on numbered workers. A pool of a user's own is a
class that takes a `WorkerSpec` and has these methods; `examples/my_pool.py` is one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from codedinvnet.serving.workers.result import Result


class WorkerDied(Exception):
    """The worker is gone, with the task that it had."""


class WorkerFailed(Exception):
    """The worker raised on this task and is ready for the next; the message says why."""


class Origin(NamedTuple):
    """A query's place in the request that it came in."""

    request: int
    position: int
    size: int


class Task(NamedTuple):
    """What a worker is to compute."""

    attempt: int
    number: int
    """The task's number in its coding group; of a call of several data tasks, that of the first."""
    inputs: Mapping[str, np.ndarray]
    """Name -> (members, *shape), of the members that the task needs."""
    origins: tuple[Origin, ...] = ()
    """The places in their requests of data tasks' queries that are sent for the first time. Faults
    that hit requests need them."""
    until: float = math.inf
    """The last of its queries' deadlines (`time.monotonic()`)."""

    @property
    def members(self) -> int:
        """How many queries the task is of."""
        return len(next(iter(self.inputs.values())))


Death = Callable[[int, str], None]
"""Called with a worker's number and a reason when it dies, busy or not."""


class WorkerPool(Protocol):
    """Workers 0 to size − 1."""

    on_death: Death | None

    async def start(self, size: int) -> None:
        """Start that many workers and return when all are ready."""

    def call(self, worker: int, task: Task) -> Awaitable[Result]:
        """Run a task, one at a time on each worker.

        Raises:
            WorkerDied: if the worker is gone.
            WorkerFailed: if it raised.
        """

    async def replace(self, worker: int) -> None:
        """End a worker, however it hangs, and return when another is ready in its place."""

    async def stop(self) -> None:
        """End all workers; nothing is left behind."""

    def pid(self, worker: int) -> int | None:
        """Return a worker's process, if it is one of this machine."""
