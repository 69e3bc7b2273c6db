"""The interface of a worker pool.

A pool knows no coding: it runs numbered tasks on numbered workers. The gateway's `CodedPool` and
`ProtectedPool` know it, since their upstreams can run nothing but a model. A pool of a user's own
is a class that takes a `WorkerSpec` and has these methods; `examples/my_pool.py` is one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from codedinvnet.serving.workers.result import Result

SILENT = "no answer within"
"""What follows an upstream's URL in the reason why it is lost, if it is silent; before seconds."""


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
    """The task's number in its coding group; of a call of several data tasks, that of the first."""
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


class Names(NamedTuple):
    """What clients and operators know workers as."""

    kind: str = "worker"
    of: Callable[[int], int | str] = int
    """What the log calls one, by its number; "" where nobody is."""


Death = Callable[[int, str], None]
"""Called with a worker's number and a reason when it dies, busy or not."""


class WorkerPool(Protocol):
    """Workers 0 to size − 1."""

    on_death: Death | None

    async def start(self, size: int) -> None:
        """Start that many workers and return when all are ready."""

    def call(self, worker: int, task: Task) -> Awaitable[Result]:
        """Run a task; as many at a time on each worker as `Rules.slots` says.

        That is one, but for upstreams.

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
