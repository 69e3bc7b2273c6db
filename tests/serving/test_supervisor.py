"""Workers that die, hang or fail: what becomes of them, and of their queries."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import Bundle
from codedinvnet.net.logs import logger
from codedinvnet.serving.answers import NotNow
from codedinvnet.serving.workers import supervisor
from codedinvnet.serving.workers.pool import Result, Task, WorkerDied
from tests.observing import counted, until
from tests.serving.bundles import BundlePool
from tests.serving.front import PATIENCE, WORKERS, K, answered, assert_decoded, decoded, running


async def test_a_killed_workers_query_is_decoded(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method) as (front, pool):
        pool.hang(2)  # so that it has its task for certain
        query = asyncio.create_task(front.ask(images[:K]))
        await until(lambda: (2, 2) in pool.calls)
        pool.kill(2)
        answers = answered(await query)
        assert_decoded(answers[2], decoded(mnist, images[:K], 2))
        await until(lambda: front.workers[2].restarts == 1)
        assert front.scheduler.workers_up == WORKERS
        assert [view.state for view in front.workers] == ["up"] * WORKERS
        assert pool.calls.count((2, 2)) == 1
        answered(await front.ask(images[: 3 * K]))
        assert any(worker == 2 for worker, _ in pool.calls[K + 1 :])


async def test_a_worker_that_fails_at_everything_is_replaced(
    method: Scheme, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger.name):
        async with running(method) as (front, pool):
            pool.broken.add(1)
            for i in range(supervisor.MOST_FAILURES):
                assert front.workers[1].restarts == 0
                calls = len([worker for worker, _ in pool.calls if worker == 1])
                while len([worker for worker, _ in pool.calls if worker == 1]) == calls:
                    answered(await front.ask(images[i : i + K]))
            await until(lambda: front.workers[1].restarts == 1)
            answered(await front.ask(images[: 3 * K], accept_decoded=False))
            assert [view.restarts for view in front.workers] == [0, 1, 0, 0, 0, 0]
            value = front.metrics.registry.get_sample_value
            failures = value("codedinvnet_task_failures_total", {"worker": "1"})
            assert failures == supervisor.MOST_FAILURES
            assert value("codedinvnet_worker_restarts_total", {"reason": "failing"}) == 1
    (lost,) = [vars(r)["fields"] for r in caplog.records if r.message == "worker lost"]
    assert lost["reason"] == "failed 5 tasks in a row: this worker is broken"
    told = [r for r in caplog.records if r.message == "task failed"]
    assert 1 <= len(told) <= 1 + told[-1].created - told[0].created  # once a second at most


async def test_a_hung_worker_is_replaced_after_a_time(method: Scheme, images: np.ndarray) -> None:
    async with running(method, policy="uncoded", hang_timeout=1.0) as (front, pool):
        pool.hang(0)
        (answer,) = answered(await front.ask(images[:1]))
        assert answer.outcome == "direct"
        assert answer.seconds >= 1.0
        await until(lambda: front.workers[0].restarts == 1)
        restarts = front.metrics.restarts.labels("hung")
        assert counted(restarts) == 1


class OldNews(BundlePool):
    """Reports a task's loss only long after the worker's death, as Ray does for a lost node."""

    def __init__(self, method: Scheme) -> None:
        super().__init__(method)
        self.told = asyncio.Event()
        self.first = True

    async def call(self, worker: int, task: Task) -> Result:
        if worker == 0 and self.first:
            self.first = False
            self.calls.append((worker, task.number))
            await self.told.wait()
            raise WorkerDied("the node is lost")
        return await super().call(worker, task)


async def test_old_news_of_a_death_do_not_end_the_next_worker(
    method: Scheme, images: np.ndarray
) -> None:
    pool = OldNews(method)
    async with running(method, pool=pool) as (front, _):
        query = asyncio.create_task(front.ask(images[:K]))
        await until(lambda: (0, 0) in pool.calls)
        pool.kill(0)
        answered(await query)
        await until(lambda: front.workers[0].restarts == 1)
        pool.told.set()
        await asyncio.sleep(0.1)
        assert front.scheduler.is_up(0)
        assert front.workers[0].restarts == 1


class Stubborn(BundlePool):
    """Workers that do not start again at the first attempts."""

    problems: list[Exception]

    async def replace(self, worker: int) -> None:
        if self.problems:
            raise self.problems.pop()
        await super().replace(worker)


async def test_a_worker_is_started_until_it_starts(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0, 0.05))

    pool = Stubborn(method)
    pool.problems = [
        WorkerDied("again"),
        OSError("no memory"),
        EOFError("the fork server ended"),
        UserError("the bundle is gone"),
    ]
    async with running(method, pool=pool) as (front, _):
        began = time.monotonic()
        pool.kill(0)
        await until(lambda: front.workers[0].restarts == 1)
        assert time.monotonic() - began > 0.19  # it waited before each further attempt
        assert front.workers[0].deaths == 5
        assert front.scheduler.is_up(0)
        answered(await front.ask(images[: 2 * K]))
        front.workers[0].since -= supervisor.STEADY  # it has been well for long
        pool.kill(0)
        await until(lambda: front.workers[0].restarts == 2)
        assert front.workers[0].deaths == 1


@pytest.mark.parametrize("policy", ["uncoded", "hedge", "coded"])
@pytest.mark.parametrize("error", [ValueError("a frame"), asyncio.CancelledError("a call")])
async def test_a_pool_that_raises_is_no_worker_that_hangs(
    error: BaseException,
    policy: str,
    method: Scheme,
    images: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Raising(BundlePool):
        async def call(self, worker: int, task: Task) -> Result:
            if worker == 2:
                raise error
            return await super().call(worker, task)

    pool = Raising(method)
    async with running(method, pool=pool, policy=policy) as (front, _):
        answers = answered(await front.ask(images[:K]))
        assert max(answer.seconds for answer in answers) < PATIENCE / 2
        await until(lambda: front.scheduler.load(2) == 0)  # nothing is left that could hang
        assert [view.deaths for view in front.workers] == [0] * WORKERS
        assert counted(front.metrics.task_failures.labels("2")) >= 1
    told = next(r for r in caplog.records if r.message == "the pool raised")
    reason = f"{type(error).__name__}: {error}"
    assert vars(told)["fields"] == {"pool": "Raising", "worker": 2, "reason": reason}
    assert told.exc_info is not None


class TestDown:
    """No worker is up, and none comes back."""

    async def test_queries_are_refused_until_one_is_back(
        self, method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.05,))

        pool = Stubborn(method)
        async with running(method, pool=pool) as (front, _):
            pool.problems = [WorkerDied("no node")] * 1000
            for worker in range(WORKERS - 1):
                pool.kill(worker)
            await asyncio.sleep(0.2)
            assert front.ready  # one is up
            pool.kill(WORKERS - 1)
            await until(lambda: not front.ready)
            with pytest.raises(NotNow, match="no worker is up"):
                await front.ask(images[:1])
            assert front.supervisor.is_live
            front.supervisor.down_timeout = 0.0
            assert not front.supervisor.is_live
            pool.problems = []
            await until(lambda: front.ready)
            assert front.supervisor.is_live
            answered(await front.ask(images[:K]))
            await until(lambda: all(view.state == "up" for view in front.workers))

    async def test_one_whose_start_takes_long_is_not_waited_for(
        self, method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "SOON", 0.3)
        go = asyncio.Event()

        class Slow(BundlePool):
            async def replace(self, worker: int) -> None:
                await go.wait()
                await super().replace(worker)

        pool = Slow(method)
        async with running(method, pool=pool) as (front, _):
            for worker in range(WORKERS):
                pool.kill(worker)
            query = asyncio.create_task(front.ask(images[:K]))
            await until(lambda: not front.ready)
            go.set()
            answered(await query)  # it was taken before
            assert front.ready

    async def test_a_mistake_of_the_users_is_not_tried_for_ever(
        self, method: Scheme, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0,))

        pool = Stubborn(method)
        async with running(method, pool=pool) as (front, _):
            pool.problems = [UserError("the weights are gone")] * 1000
            for worker in range(WORKERS):
                assert front.supervisor.is_live
                pool.kill(worker)
            await until(lambda: not front.supervisor.is_live)
            assert [view.state for view in front.workers] == ["abandoned"] * WORKERS
            assert len(pool.problems) == 1000 - WORKERS * supervisor.MOST_STARTS
        given_up = [r for r in caplog.records if r.message == "worker given up"]
        assert len(given_up) == WORKERS
