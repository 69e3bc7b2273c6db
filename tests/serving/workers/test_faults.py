"""Faults that are injected around a pool."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest

from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Fault
from codedinvnet.serving.workers import faults as module
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from codedinvnet.serving.workers.pool import OUTPUT, Death, Origin, Result, Task, WorkerDied
from tests.serving.bundles import output

INPUTS = {"images": np.zeros((1, 1, 2, 2), np.uint8)}


MS_100 = {"ms": 100}


T = TypeVar("T")


class InnerPool:
    """Answers at once, and notes what it was asked."""

    def __init__(self) -> None:
        self.on_death: Death | None = None
        self.calls: list[tuple[int, int]] = []
        self.deeds: list[str] = []
        self.pids: dict[int, int] = {}

    async def start(self, size: int) -> None:
        self.deeds.append(f"start {size}")

    async def call(self, worker: int, task: Task) -> Result:
        self.calls.append((worker, task.attempt))
        return Result({OUTPUT: np.full((1, 1000), task.attempt, np.float32)}, 0.5)

    async def replace(self, worker: int) -> None:
        self.deeds.append(f"replace {worker}")

    async def stop(self) -> None:
        self.deeds.append("stop")

    def pid(self, worker: int) -> int | None:
        return self.pids.get(worker)


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        self.slept: list[float] = []
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(FaultyPool, "_block", self._block)

    async def _block(self, worker: int, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def schedule(*faults: dict[str, Any], seed: int = 1) -> Schedule:
    return Schedule.model_validate({"seed": seed, "faults": faults})


def run(
    work: Callable[[FaultyPool, InnerPool], Awaitable[T]],
    *faults: dict[str, Any],
    seed: int = 1,
    size: int = 4,
) -> T:
    """Run something on a started pool."""

    async def main() -> T:
        inner = InnerPool()
        pool = FaultyPool(inner, schedule(*faults, seed=seed))
        await pool.start(size)
        return await asyncio.wait_for(work(pool, inner), 20)

    return asyncio.run(main())


def task(attempt: int, *origins: Origin) -> Task:
    return Task(attempt, 0, INPUTS, origins)


def held(*faults: dict[str, Any], tasks: list[tuple[int, Task]], seed: int = 1) -> list[float]:
    """Return for how long each task's answer is held back."""

    async def work(pool: FaultyPool, _: InnerPool) -> list[float]:
        return [(await pool.call(worker, t)).held for worker, t in tasks]

    return run(work, *faults, seed=seed)


# Kinds


def test_without_faults_the_pool_is_the_inner_one() -> None:
    async def work(pool: FaultyPool, inner: InnerPool) -> None:
        pool.on_death = on_death = lambda worker, reason: None
        assert inner.on_death is pool.on_death is on_death
        result = await pool.call(2, task(7))
        assert output(result).tolist() == [7] * 1000
        assert (result.seconds, result.held) == (0.5, 0)
        inner.pids[1] = 4321
        assert (pool.pid(0), pool.pid(1)) == (None, 4321)
        await pool.replace(3)
        await pool.stop()
        assert inner.deeds == ["start 4", "replace 3", "stop"]
        assert inner.calls == [(2, 7)]

    run(work)


def test_slow_blocks_the_worker_and_a_spread_delay_is_the_same_in_all(clock: Clock) -> None:
    async def work(pool: FaultyPool, _: InnerPool) -> list[list[float]]:
        found = []
        for attempt in range(200):
            clock.slept.clear()
            assert (await pool.call(1, task(attempt))).held == 0
            found.append(list(clock.slept))
        clock.slept.clear()
        await pool.call(0, task(8))
        assert clock.slept == []
        return found

    slow = {"kind": "slow", "worker": 1, "delay": MS_100}
    assert run(work, slow) == [[0.1]] * 200
    spread = run(work, {**slow, "spread": True})
    assert [sum(slept) for slept in spread] == pytest.approx([0.1] * 200)
    early = [before for before, _ in spread]
    assert min(early) < 0.01
    assert max(early) > 0.09


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "hang"}, "replaced while it hung"),
        ({"kind": "slow", "delay": {"ms": 60_000}}, "replaced while it was slow"),
    ],
)
def test_a_worker_that_is_replaced_has_lost_its_task(fault: dict[str, Any], message: str) -> None:
    """It must not compute it at the same time as the next one's."""

    async def work(pool: FaultyPool, inner: InnerPool) -> None:
        call = asyncio.ensure_future(pool.call(1, task(7)))
        await pool.replace(0)
        await asyncio.sleep(0.01)
        assert not call.done()
        await pool.replace(1)
        with pytest.raises(WorkerDied, match=message):
            await call
        assert inner.calls == []
        assert inner.deeds == ["start 4", "replace 0", "replace 1"]
        again = asyncio.ensure_future(pool.call(1, task(8)))  # the new one is no better
        await asyncio.sleep(0.01)
        assert not again.done()
        again.cancel()

    run(work, fault)


def test_crash_kills_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, sign: killed.append((pid, sign)))

    async def work(pool: FaultyPool, inner: InnerPool) -> None:
        inner.pids[1] = 4321
        for worker in (0, 1):
            with pytest.raises(WorkerDied, match="injected crash"):
                await pool.call(worker, task(7))
        assert inner.calls == []

    run(work, {"kind": "crash"})
    assert killed == [(4321, signal.SIGKILL)]


def test_corrupt_adds_noise() -> None:
    async def work(pool: FaultyPool, _: InnerPool) -> list[np.ndarray]:
        return [output(await pool.call(worker, task(7))) for worker in (1, 1, 0)]

    lie, other, truth = run(work, {"kind": "corrupt", "worker": 1, "scale": 2.0})
    assert lie.dtype == np.float32
    assert float((lie - 7).std()) == pytest.approx(2, rel=0.1)
    assert not np.array_equal(lie, other)
    assert truth.tolist() == [7] * 1000


# When and whom


def test_a_fault_is_on_in_its_time(clock: Clock) -> None:
    async def work(pool: FaultyPool, _: InnerPool) -> list[bool]:
        hit = []
        for now in (0, 9.9, 10, 10.4, 10.5, 20):
            clock.now = 50 + now
            hit.append((await pool.call(1, task(7))).held > 0)
        return hit

    fault = {"kind": "hold", "delay": MS_100, "from_s": 10, "until_s": 10.5}
    assert run(work, fault) == [False, False, True, True, False, False]
    clock.now = 50
    assert run(work, {"kind": "hold", "delay": MS_100}) == [True] * 6


def test_faults_come_and_go() -> None:
    async def work(pool: FaultyPool, _: InnerPool) -> list[float]:
        found = []

        async def look() -> None:
            for worker in (0, 1):
                found.append((await pool.call(worker, task(7))).held)

        await look()
        pool.add(Fault(kind="hold", worker=1, delay=Distribution(ms=50)))
        pool.add(Fault(kind="hold", worker=0, delay=Distribution(ms=25)))
        await look()
        pool.clear(1)
        await look()
        return found

    fault = {"kind": "hold", "delay": MS_100}
    expected = [0.1, 0.1, 0.125, 0.15, 0.125, 0.1]
    assert run(work, fault) == pytest.approx(expected)


def test_a_fault_of_a_worker_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^the faults name worker 4; there are 4$"):
        held({"kind": "hang", "worker": 4}, tasks=[])


def test_a_seed_repeats_itself_whatever_the_other_workers_do() -> None:
    fault = {"kind": "hold", "probability": 0.5, "delay": {"distribution": "exponential", "ms": 10}}
    one = [(1, task(i)) for i in range(50)]
    mixed = [pair for i in range(50) for pair in ((0, task(100 + i)), (1, task(i)))]
    alone = held(fault, tasks=one, seed=5)
    assert alone == held(fault, tasks=one, seed=5)
    assert alone == held(fault, tasks=mixed, seed=5)[1::2]
    assert alone != held(fault, tasks=one, seed=6)
    assert alone != held(fault, tasks=[(2, t) for _, t in one], seed=5)


def test_per_request_hits_one_position_of_some_requests() -> None:
    fault = {"kind": "hold", "probability": 0.25, "per_request": True, "delay": MS_100}
    size, requests = 4, 800
    tasks = [
        (position, task(request * size + position, Origin(request, position, size)))
        for request in range(requests)
        for position in range(size)
    ]
    hits = np.array(held(fault, tasks=tasks)).reshape(requests, size) > 0
    assert set(hits.sum(axis=1).tolist()) == {0, 1}
    assert hits.any(axis=1).mean() == pytest.approx(0.25, abs=0.05)
    assert hits.sum(axis=0).min() > requests * 0.25 / size / 2
    again = np.array(held(fault, tasks=tasks[::-1])).reshape(requests, size)[::-1, ::-1] > 0
    assert np.array_equal(hits, again)
    other = np.array(held(fault, tasks=tasks, seed=2)).reshape(requests, size) > 0
    assert not np.array_equal(hits, other)
