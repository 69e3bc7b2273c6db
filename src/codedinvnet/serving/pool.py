"""The interface of a worker pool, and the in-process fake that tests run on.

A pool knows no coding: it runs numbered tasks on numbered workers.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from codedinvnet.bundle import load_bundle
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.method import Tolerance
from codedinvnet.codes.registry import OURS
from codedinvnet.devices import use_whole_float32
from codedinvnet.errors import UserError
from codedinvnet.files import file_digest
from codedinvnet.models.runtime import ONNX_RUNTIME, PYTORCH, check_engine, check_installed
from codedinvnet.serving.engine import is_kept, run_by_onnxruntime


class WorkerDied(Exception):
    """The worker is gone, with the task that it had."""


class WorkerFailed(Exception):
    """The worker raised on this task and is ready for the next."""


class Origin(NamedTuple):
    """A query's place in the request that it came in."""

    request: int
    position: int
    size: int


class Task(NamedTuple):
    """What a worker is to compute."""

    attempt: int
    number: int
    """The task's number in the coding method."""
    images: np.ndarray
    """(members, C, H, W), uint8 or float32 in 0..1."""
    origin: Origin | None = None
    """Of a query's first sending: its place in its request. Faults that hit requests need it."""


class Result(NamedTuple):
    """What a worker computed."""

    output: np.ndarray
    """(n,) float32."""
    seconds: float
    """Its computing time."""
    encode_seconds: float = 0.0
    """The part of it that went into encoding."""
    held: float = 0.0
    """For how many seconds an injected fault keeps the answer back; the worker is free."""
    blocked: float = 0.0
    """For how many seconds injected faults kept the worker from the task."""


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker loads.

    Attributes:
        bundle: name or folder.
        k: the most members of a group.
        device: what to compute on.
        threads: that a worker computes with.
        method: the coding method, as `find_method` takes it.
        part: the checkpoint of the part that it needs beside the bundle, if it does.
        stragglers: see `Tolerance`.
        errors: likewise.
        weights: digest of the bundle's weights that the front end has ("": any will do).
        part_weights: likewise of the part's file.
        engine: what computes the networks, one of `codedinvnet.models.runtime.ENGINES`.
    """

    bundle: str | Path
    k: int
    device: str = "cpu"
    threads: int = 1
    method: str = OURS
    part: Path | None = None
    stragglers: int = 1
    errors: int = 1
    weights: str = ""
    part_weights: str = ""
    engine: str = PYTORCH

    def load(self) -> Scheme:
        """Load the scheme, and compute each of its tasks once, so that no query pays for it.

        This is for a worker's own process: its number of threads and its precision are set.

        Raises:
            UserError: if it cannot be loaded, other weights lie there than the front end has, or
                the engine is not installed here.
        """
        torch.set_num_threads(self.threads)
        use_whole_float32()
        scheme = self._scheme()
        if self.engine == ONNX_RUNTIME:
            run_by_onnxruntime(scheme.networks())
        size = scheme.rules.k
        zeros = torch.zeros(1, size, *scheme.shape, dtype=torch.uint8)
        for number, task in scheme.rules.tasks(size).items():
            if number in (0, size):
                scheme.compute(number, zeros[:, : len(task.members)])
        return scheme

    def is_prepared(self) -> bool:
        """Tell whether `load` takes no longer than it must; raises alike."""
        if self.engine != ONNX_RUNTIME:
            return True
        return is_kept(self._scheme().networks())

    def _scheme(self) -> Scheme:
        check_engine(self.engine, self.device)
        check_installed(self.engine)
        bundle = load_bundle(self.bundle, self.device)
        tolerance = Tolerance(self.stragglers, self.errors)
        scheme = scheme_for(bundle, self.k, self.method, self.part, tolerance)
        if self.weights:
            check_weights(self.bundle, bundle.digest(), self.weights)
        if self.part_weights and self.part is not None:
            check_weights(self.part, file_digest(self.part), self.part_weights)
        return scheme


def check_weights(place: str | Path, found: str, wanted: str) -> None:
    """Raise UserError if weights were exchanged while the service runs: answers would be mixed."""
    if found != wanted:
        raise UserError(
            f"{place} has weights {found}, the front end has {wanted}: restart the service"
        )


def freeze_loaded() -> None:
    """Keep what this process has loaded out of the garbage collector's rounds, for good.

    Walking through PyTorch's objects takes 0.1 s, in which a front end or a worker does nothing
    else; it was what the slowest of a thousand requests waited for.
    """
    gc.collect()
    gc.freeze()


def run_task(scheme: Scheme, number: int, images: np.ndarray) -> Result:
    """Compute one task's output (n,) of images (members, C, H, W), and time it."""
    began = time.perf_counter()
    output, encoding = scheme.compute(number, torch.from_numpy(images)[None])
    array = np.ascontiguousarray(output[0].float().cpu().numpy())
    return Result(array, time.perf_counter() - began, encoding)


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
        scheme: what they compute with.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
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
        return await asyncio.to_thread(run_task, self.scheme, task.number, task.images)

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
