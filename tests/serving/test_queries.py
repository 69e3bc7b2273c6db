"""Queries that end without an answer: late, too many, given up, or the service stops."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.serving.answers import Answered, Cancelled, DeadlinePassed, NotNow
from tests.observing import counted, until
from tests.serving.bundles import BundleFront
from tests.serving.front import PATIENCE, WORKERS, K, answered, running


@pytest.mark.parametrize("per_request", [False, True])
async def test_deadline(per_request: bool, method: Scheme, images: np.ndarray) -> None:
    deadline = PATIENCE if per_request else 0.3
    async with running(method, deadline=deadline) as (front, pool):
        for worker in range(WORKERS):
            pool.hang(worker)
        found = await front.ask(images[: K + 1], deadline=0.3 if per_request else 50.0)
        assert all(isinstance(problem, DeadlinePassed) for problem in found)
        assert all(str(problem).startswith("deadline; at worker ") for problem in found)
        assert counted(front.metrics.queries.labels("deadline")) == K + 1
        count, seconds = latencies(front, "deadline")
        assert (count, seconds >= 0.3 * count) == (K + 1, True)


def latencies(front: BundleFront, outcome: str) -> tuple[float, float]:
    """Return how many queries that ended so are among the latencies, and their seconds."""
    name, labels = "codedinvnet_query_latency_seconds", {"outcome": outcome}
    value = front.metrics.registry.get_sample_value
    return value(f"{name}_count", labels) or 0.0, value(f"{name}_sum", labels) or 0.0


async def test_what_is_too_late_already_is_not_computed(method: Scheme, images: np.ndarray) -> None:
    async with running(method) as (front, pool):
        began = time.monotonic() - 1
        found = await front.ask(images[:K], deadline=0.9, began=began)
        assert [type(one) for one in found] == [DeadlinePassed] * K
        assert counted(front.metrics.queries.labels("deadline")) == K
        count, seconds = latencies(front, "deadline")
        assert (count, seconds >= count) == (K, True)
        assert pool.calls == []


@pytest.mark.parametrize("told", [False, True], ids=["cancelled", "told"])
async def test_a_caller_that_goes_away(told: bool, method: Scheme, images: np.ndarray) -> None:
    async with running(method, max_pending=5 * K) as (front, pool):
        for worker in range(WORKERS):
            pool.hang(worker)
        gone = asyncio.get_running_loop().create_future()
        query = asyncio.create_task(front.ask(images[: 5 * K], gone=gone))
        await until(lambda: len(pool.calls) == WORKERS)
        with pytest.raises(NotNow, match="overloaded"):
            front.check_room(1)
        if told:
            gone.set_result(None)
            assert [str(problem) for problem in await query] == ["cancelled"] * 5 * K
        else:
            query.cancel()
            with pytest.raises(asyncio.CancelledError):
                await query
        front.update_gauges()
        value = front.metrics.registry.get_sample_value
        assert value("codedinvnet_queries_total", {"outcome": "cancelled"}) == 5 * K
        assert value("codedinvnet_pending_queries") == 0
        assert value("codedinvnet_queue_depth") == 0
        front.check_room(5 * K)
        for worker in range(WORKERS):
            pool.kill(worker)
        assert len(pool.calls) == WORKERS
        answered(await front.ask(images[:K]))
        assert value("codedinvnet_queries_total", {"outcome": "cancelled"}) == 5 * K


async def test_what_is_answered_is_not_cancelled(method: Scheme, images: np.ndarray) -> None:
    async with running(method, policy="uncoded") as (front, pool):
        pool.hang(0)
        gone = asyncio.get_running_loop().create_future()
        query = asyncio.create_task(front.ask(images[:3], gone=gone))
        await until(lambda: len(front.queries) == 1)
        gone.set_result(None)
        found = await query
        assert [type(answer) for answer in found] == [Cancelled, Answered, Answered]
        counts = front.metrics.queries.labels
        assert counted(counts("direct")) == 2
        assert counted(counts("cancelled")) == latencies(front, "cancelled")[0] == 1
        pool.kill(0)
        again = asyncio.get_running_loop().create_future()
        answered(await front.ask(images[:3], gone=again))
        again.set_result(None)  # long after
        await asyncio.sleep(0)
        assert counted(counts("cancelled")) == 1
