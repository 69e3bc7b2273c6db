"""The interface of a worker pool, and the in-process fake that tests run on.

A pool knows no coding: it runs numbered tasks on numbered workers. A pool of a user's own is a
class that takes a `WorkerSpec` and has these methods; `examples/my_pool.py` is one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from codedinvnet.serving.workers.result import Computer, Result, run_task


class WorkerDied(Exception):
    """The worker is gone, with the task that it had."""


class WorkerFailed(Exception):
    """The worker raised on this task and is ready for the next.

    Args:
        reason: why.
        blamed: whether a worker that fails several tasks in a row for it is replaced.
    """

    final = False
    """Whether no worker is to be given the task again."""

    def __init__(self, reason: str = "", *, blamed: bool = True) -> None:
        super().__init__(reason)
        self.blamed = blamed


class GivenUp(WorkerFailed):
    """Likewise, and its query ends by that, unless something is under way that may answer it."""

    final = True


class Origin(NamedTuple):
    """A query's place in the request that it came in."""

    request: int
    position: int
    size: int


class Task(NamedTuple):
    """What a worker is to compute."""

    attempt: int
    number: int
    """The task's number in its coding group."""
    inputs: Mapping[str, np.ndarray]
    """Name -> (members, *shape), of the members that the task needs."""
    origins: tuple[Origin, ...] = ()
    """The places in their requests of data tasks' queries that are sent for the first time. Faults
    that hit requests need them."""
    until: float = math.inf
    """When nobody waits for its queries' answers any more (`time.monotonic()`)."""

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

    async def call(self, worker: int, task: Task) -> Result:
        """Run a task; one at a time on each worker.

        Raises:
            WorkerDied: if the worker is gone.
            WorkerFailed: if it raised.
            GivenUp: likewise, if its query is to be sent to nobody again.
            Abandoned: if there is no result, and nobody waits for one any more.
        """

    async def replace(self, worker: int) -> None:
        """End a worker, however it hangs, and return when another is ready in its place."""

    async def stop(self) -> None:
        """End all workers; nothing is left behind."""

    def pid(self, worker: int) -> int | None:
        """Return a worker's process, if it is one of this machine."""


class InProcessPool:
    """Workers that are threads of this process, for tests: they die and hang on request.

    Args:
        computer: what they compute with.
    """

    def __init__(self, computer: Computer) -> None:
        self.computer = computer
        self.on_death: Death | None = None
        self.dead: list[asyncio.Event] = []
        self.hung: list[asyncio.Event] = []
        self.calls: list[tuple[int, int]] = []
        """(worker, task number) of every call."""
        self.broken: set[int] = set()
        """Workers whose forward pass raises."""

    async def start(self, size: int) -> None:
        self.dead = [asyncio.Event() for _ in range(size)]
        self.hung = [asyncio.Event() for _ in range(size)]

    async def call(self, worker: int, task: Task) -> Result:
        self.calls.append((worker, task.number))
        if worker in self.broken:
            raise WorkerFailed("this worker is broken")
        dead = asyncio.create_task(self.dead[worker].wait())
        work = asyncio.create_task(self._work(worker, task))
        await asyncio.wait({dead, work}, return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()
        if not work.done() or self.dead[worker].is_set():
            work.cancel()
            raise WorkerDied("killed")
        return await work

    async def _work(self, worker: int, task: Task) -> Result:
        if self.hung[worker].is_set():
            await self.dead[worker].wait()
        return await asyncio.to_thread(run_task, self.computer, task.number, task.inputs)

    def kill(self, worker: int) -> None:
        """Let a worker die."""
        self.dead[worker].set()
        if self.on_death is not None:
            self.on_death(worker, "killed")

    def hang(self, worker: int) -> None:
        """Let a worker hang from its next task on."""
        self.hung[worker].set()

    async def replace(self, worker: int) -> None:
        self.dead[worker].set()
        await asyncio.sleep(0)
        self.dead[worker], self.hung[worker] = asyncio.Event(), asyncio.Event()
        self.broken.discard(worker)

    async def stop(self) -> None:
        for event in self.dead:
            event.set()
        await asyncio.sleep(0)

    def pid(self, worker: int) -> int | None:
        return None
