"""Fault injection: a seeded schedule of slow, hung, crashing and lying workers, around any pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from codedinvnet.common.config import Section, validated
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.faults import Fault, Injected, check_workers
from codedinvnet.common.files import read_json
from codedinvnet.serving.workers.pool import Death, Origin, Result, Task, WorkerDied, WorkerPool


class Schedule(Section):
    """The contents of a faults file."""

    seed: Annotated[int, Field(ge=0)] = 0
    faults: tuple[Injected, ...] = ()


def load_schedule(path: Path) -> Schedule:
    """Read a faults file.

    Raises:
        UserError: if it is not one.
    """
    raw = read_json(path, "the faults file")
    return validated(Schedule, raw, path)


def _drawn(delay: Distribution, generator: np.random.Generator) -> float:
    """Return a delay in seconds."""
    return float(delay.draw(generator, 1)[0])


class FaultyPool:
    """A pool whose workers misbehave by a schedule; everything else is the inner pool's.

    Each worker draws from a generator of its own, so the n-th task of a worker meets the same fate
    in every run.
    """

    def __init__(self, pool: WorkerPool, schedule: Schedule) -> None:
        self.pool = pool
        self.schedule = schedule
        self.faults = list(schedule.faults)
        self.generators: list[np.random.Generator] = []
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
        self.generators = [np.random.default_rng((self.schedule.seed, i)) for i in range(size)]
        self.replaced = [asyncio.Event() for _ in range(size)]
        self.began = time.monotonic()

    async def call(self, worker: int, task: Task) -> Result:
        generator, held, after = self.generators[worker], 0.0, 0.0
        now = time.monotonic() - self.began
        hit = [
            fault
            for place, fault in enumerate(self.faults)
            if fault.concerns(task.number)
            and self._strikes(place, fault, generator, task)
            and fault.hits(worker, now)
        ]
        for fault in hit:
            if fault.kind == "slow" and fault.delay is not None:
                delay = _drawn(fault.delay, generator) * (task.members if fault.each_image else 1)
                early = delay * generator.random() if fault.spread else delay
                after += delay - early
                await self._block(worker, early)
            elif fault.kind == "hold" and fault.delay is not None:
                held += _drawn(fault.delay, generator)
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
                outputs = {
                    name: (array + fault.scale * generator.standard_normal(array.shape)).astype(
                        array.dtype
                    )
                    if np.issubdtype(array.dtype, np.floating)
                    else array
                    for name, array in result.outputs.items()
                }
                result = result._replace(outputs=outputs)
        if after > 0:
            await self._block(worker, after)
        return result._replace(held=held)

    async def _block(self, worker: int, seconds: float) -> None:
        """Sleep; a worker that is replaced meanwhile has lost its task."""
        try:
            await asyncio.wait_for(self.replaced[worker].wait(), seconds)
        except TimeoutError:
            return
        raise WorkerDied("replaced while it was slow")

    def _strikes(
        self, place: int, fault: Fault, generator: np.random.Generator, task: Task
    ) -> bool:
        if not fault.per_request:
            return generator.random() < fault.probability
        return any(self._doomed(place, fault, origin) for origin in task.origins)

    def _doomed(self, place: int, fault: Fault, origin: Origin) -> bool:
        """Return whether a fault hits the query that has this place in its request."""
        own = f"/{place}" if place else ""  # each has its targets
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
