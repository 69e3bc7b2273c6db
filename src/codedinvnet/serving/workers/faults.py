"""Fault injection: a seeded schedule of slow, hung, crashing and lying workers, around any pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from codedinvnet.config import Section, validated
from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.serving.workers.pool import Death, Origin, Task, WorkerDied, WorkerPool
from codedinvnet.serving.workers.result import Result


class Delay(Section):
    """A distribution of delays, in ms."""

    distribution: Literal["constant", "exponential", "pareto"] = "constant"
    ms: Annotated[float, Field(ge=0)]
    """The delay, the mean, or the Pareto scale (the least delay)."""
    shape: Annotated[float, Field(gt=0)] = 1.5
    """The Pareto shape; the smaller, the heavier the tail."""

    def draw(self, generator: random.Random) -> float:
        """Return a delay in seconds."""
        if self.distribution == "exponential":
            return self.ms * generator.expovariate(1.0) / 1000
        if self.distribution == "pareto":
            return self.ms * generator.paretovariate(self.shape) / 1000
        return self.ms / 1000


class FaultWindow(Section):
    """Where and when something goes wrong."""

    worker: Annotated[int, Field(ge=0)] | None = None
    """None: every worker."""
    from_s: Annotated[float, Field(ge=0)] = 0.0
    until_s: float | None = None
    """Seconds since the pool started."""

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> FaultWindow:
        if self.until_s is not None and self.until_s <= self.from_s:
            raise ValueError(f"until_s {self.until_s:g} is not after from_s {self.from_s:g}")
        return self

    def hits(self, worker: int, now: float) -> bool:
        """Tell whether it is on for a worker at this time (seconds since the start)."""
        on = self.from_s <= now and (self.until_s is None or now < self.until_s)
        return on and self.worker in (None, worker)


OPTIONS = {
    "delay": ("slow", "hold"),
    "each_image": ("slow",),
    "spread": ("slow",),
    "scale": ("corrupt",),
}
"""Options of a fault that not every kind has."""


class Fault(FaultWindow):
    """What goes wrong, on which worker, and when."""

    kind: Literal["slow", "hold", "hang", "crash", "corrupt"]
    """slow: the worker is blocked; hold: its answer is held back while it goes on; hang: it never
    answers; crash: it dies; corrupt: noise is added to its output."""
    from_task: Annotated[int, Field(ge=0)] = 0
    until_task: Annotated[int, Field(gt=0)] | None = None
    """Numbers of tasks in the method that are hit: k is that of the first parity."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of each task to be hit; with `per_request`, of each request."""
    per_request: bool = False
    """Hit one data task of a request, not each task for itself (Dinh & Lee, section 4.3)."""
    delay: Delay | None = None
    """Of slow and hold."""
    each_image: bool = False
    """Of slow: so much for every image of the task, as encoding takes for every one of a group."""
    spread: bool = False
    """Of slow: a random part of the delay comes after the computing instead of before it, so that
    tasks that were given out together do not compute together."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Of corrupt: the noise's standard deviation."""

    @model_validator(mode="after")
    def _delayed(self) -> Fault:
        if self.kind in ("slow", "hold") and self.delay is None:
            raise ValueError(f"a fault of kind {self.kind!r} needs a delay")
        for option, kinds in OPTIONS.items():
            default = type(self).model_fields[option].default
            if self.kind not in kinds and getattr(self, option) != default:
                words = " and ".join(map(repr, kinds))
                raise ValueError(f"{option} is an option of kind {words}, not of {self.kind!r}")
        if self.until_task is not None and self.until_task <= self.from_task:
            raise ValueError(
                f"until_task {self.until_task} is not above from_task {self.from_task}"
            )
        return self

    def concerns(self, number: int) -> bool:
        """Tell whether it can hit the task of this number."""
        return self.from_task <= number and (self.until_task is None or number < self.until_task)


class Schedule(Section):
    """The contents of a faults file."""

    seed: int = 0
    faults: tuple[Fault, ...] = ()


def load_schedule(path: Path) -> Schedule:
    """Read a faults file.

    Raises:
        UserError: if it is not one.
    """
    raw = read_json(path, "the faults file")
    return validated(Schedule, raw, path)


def check_workers(faults: Iterable[Fault], size: int) -> None:
    """Make sure that faults name none but the workers that there are.

    Raises:
        UserError: if one does.
    """
    for fault in faults:
        if fault.worker is not None and fault.worker >= size:
            raise UserError(f"the faults name worker {fault.worker}; there are {size}")


def check_per_request(faults: Iterable[Fault], method: str) -> None:
    """Make sure that faults can hit a method whose tasks are all mixtures of a group.

    Raises:
        UserError: if one is of a request's data task.
    """
    if any(fault.per_request for fault in faults):
        raise UserError(
            f"the faults hit a data task of a request (per_request); {method} has none: each of "
            "its tasks is a mixture of the whole group"
        )


class FaultyPool:
    """A pool whose workers misbehave by a schedule; everything else is the inner pool's.

    Each worker draws from a generator of its own, so the n-th task of a worker meets the same fate
    in every run.

    Args:
        pool: the pool.
        schedule: the faults; `add` and `clear` change them later.
    """

    def __init__(self, pool: WorkerPool, schedule: Schedule) -> None:
        self.pool = pool
        self.schedule = schedule
        self.faults = list(schedule.faults)
        self.generators: list[random.Random] = []
        self.replaced: list[asyncio.Event] = []
        self.began = time.monotonic()

    @property
    def on_death(self) -> Death | None:
        """The inner pool's."""
        return self.pool.on_death

    @on_death.setter
    def on_death(self, call: Death | None) -> None:
        self.pool.on_death = call

    def add(self, fault: Fault) -> None:
        """Let something else go wrong from now on."""
        self.faults.append(fault)

    def clear(self, worker: int) -> None:
        """End the faults of one worker."""
        self.faults = [fault for fault in self.faults if fault.worker != worker]

    async def start(self, size: int) -> None:
        check_workers(self.faults, size)
        await self.pool.start(size)
        self.generators = [random.Random(f"{self.schedule.seed}/{i}") for i in range(size)]
        self.replaced = [asyncio.Event() for _ in range(size)]
        self.began = time.monotonic()

    async def call(self, worker: int, task: Task) -> Result:
        generator, held, before, after = self.generators[worker], 0.0, 0.0, 0.0
        now = time.monotonic() - self.began
        hit = [
            fault
            for place, fault in enumerate(self.faults)
            if fault.concerns(task.number)
            and self._drawn(place, fault, generator, task)
            and fault.hits(worker, now)
        ]
        for fault in hit:
            if fault.kind == "slow" and fault.delay is not None:
                delay = fault.delay.draw(generator) * (task.members if fault.each_image else 1)
                early = delay * generator.random() if fault.spread else delay
                before, after = before + early, after + delay - early
                await self._block(worker, early)
            elif fault.kind == "hold" and fault.delay is not None:
                held += fault.delay.draw(generator)
            elif fault.kind == "hang":
                await self.replaced[worker].wait()
                raise WorkerDied("replaced while it hung")
            elif fault.kind == "crash":
                if (pid := self.pool.pid(worker)) is not None:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGKILL)
                raise WorkerDied("injected crash")
        result = await self.pool.call(worker, task)
        for fault in hit:
            if fault.kind == "corrupt":
                noise = np.random.default_rng(generator.getrandbits(63))
                outputs = {
                    name: (array + fault.scale * noise.standard_normal(array.shape)).astype(
                        array.dtype
                    )
                    if np.issubdtype(array.dtype, np.floating)
                    else array
                    for name, array in result.outputs.items()
                }
                result = result._replace(outputs=outputs)
        if after > 0:
            await self._block(worker, after)
        return result._replace(held=held, blocked=before + after)

    async def _block(self, worker: int, seconds: float) -> None:
        """Sleep; a worker that is replaced meanwhile has lost its task."""
        try:
            await asyncio.wait_for(self.replaced[worker].wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise WorkerDied("replaced while it was slow")

    def _drawn(self, place: int, fault: Fault, generator: random.Random, task: Task) -> bool:
        if not fault.per_request:
            return generator.random() < fault.probability
        return any(self._doomed(place, fault, origin) for origin in task.origins)

    def _doomed(self, place: int, fault: Fault, origin: Origin) -> bool:
        """Tell whether a fault hits the query that has this place in its request."""
        own = f"/{place}" if place else ""  # each has its victims
        fate = random.Random(f"{self.schedule.seed}/request/{origin.request}{own}")
        return fate.random() < fault.probability and fate.randrange(origin.size) == origin.position

    async def replace(self, worker: int) -> None:
        self.replaced[worker].set()
        self.replaced[worker] = asyncio.Event()
        await self.pool.replace(worker)

    async def stop(self) -> None:
        await self.pool.stop()

    def pid(self, worker: int) -> int | None:
        return self.pool.pid(worker)
