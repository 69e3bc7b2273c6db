"""The interface of a worker pool, and what workers compute: plain arrays, without PyTorch.

A pool knows no coding: it runs numbered tasks on numbered workers. A pool of a user's own is a
class that takes a `WorkerSpec` and has these methods; `examples/my_pool.py` is one.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codedinvnet.net.protocol.tensors import DATATYPES, TensorSpec

OUTPUT = ""
"""The name of a scheme's output among a worker's; a model's own outputs have longer ones."""


class Result(NamedTuple):
    """What a worker computed."""

    outputs: Mapping[str, np.ndarray]
    """Name -> (B, ...): what clients get of a data task, and a scheme's output under OUTPUT."""
    seconds: float
    """The worker's computing time."""
    encode_seconds: float = 0.0
    """The part of `seconds` that went into encoding; 0 for tasks that are not encoded."""
    held: float = 0.0
    """For how many seconds an injected fault keeps the answer back; the worker is free."""


class Computer(Protocol):
    """What a worker computes tasks with."""

    def compute(
        self, number: int, inputs: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], float]:
        """Return a task's outputs, and the seconds that encoding took.

        The inputs are name -> (members, *shape), of the members that the task needs.
        """


def run_task(computer: Computer, number: int, inputs: Mapping[str, np.ndarray]) -> Result:
    """Compute one task, and time it.

    Raises:
        InputRefused: if the model fails on these inputs, but not on zeros in their place.
    """
    began = time.perf_counter()
    try:
        outputs, encoding = computer.compute(number, inputs)
    except Exception as error:
        if not works(computer, number, inputs):
            raise
        raise InputRefused(f"{type(error).__name__}: {error}") from error
    return Result(outputs, time.perf_counter() - began, encoding)


def works(computer: Computer, number: int, inputs: Mapping[str, np.ndarray]) -> bool:
    """Return whether a task can be computed of zeros in the place of its inputs."""
    try:
        computer.compute(
            number,
            {
                name: np.full(array.shape, b"" if array.dtype == object else 0, array.dtype)
                for name, array in inputs.items()
            },
        )
    except Exception:
        return False
    return True


def floated(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs as codes take them: all floats as float32."""
    return {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array.copy()
        for name, array in inputs.items()
    }


def copied(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs as backups take them: what `protect` measured them on, and writable."""
    return {name: array.copy() for name, array in inputs.items()}


def zeros(inputs: Sequence[TensorSpec], rows: int = 1) -> dict[str, np.ndarray]:
    """Return a batch of queries of zeros: name -> (rows, *shape)."""
    return {
        spec.name: np.full(
            (rows, *spec.shape), b"" if spec.datatype == "BYTES" else 0, DATATYPES[spec.datatype]
        )
        for spec in inputs
    }


class WorkerDied(Exception):
    """The worker is gone, with the task that it had."""


class WorkerFailed(Exception):
    """The worker raised on this task and is ready for the next; the message says why."""


class InputRefused(WorkerFailed):
    """The model fails on this input and on no other: it would on any worker."""


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
