"""What a service keeps of its last requests and tasks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.scheduler.settings import POLICIES, Rules
from codedinvnet.serving.answers import Answered, Overloaded, QueryFailed
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.supervisor import ABSENT, GIVEN_UP, STATES, Loss
from codedinvnet.serving.traffic import CANCELLED, OWN, REFUSED, REQUESTS, TASKS, Traffic
from codedinvnet.serving.traffic_report import Known, told
from codedinvnet.serving.workers.pool import Death, Task
from codedinvnet.serving.workers.result import Result


def ended(traffic: Traffic, *seconds: float, at: float | None = None) -> None:
    began = time.monotonic() - max(seconds) if at is None else at
    traffic.ended(began, [Answered({}, "direct", value, value / 2) for value in seconds])


def test_a_request_takes_as_long_as_its_last_answer() -> None:
    traffic = Traffic()
    found: list[Answered | QueryFailed] = [
        Answered({}, "direct", 0.2, 0.1),
        Answered({}, "decoded", 0.5, 0.3),
    ]
    assert traffic.ended(7.0, found) == found
    (request,) = traffic.requests
    assert (request.at, request.queries, request.seconds, request.made_up) == (7.0, 2, 0.5, 1)
    assert request.besides == pytest.approx(0.2)
    traffic.ended(7.0, found, read=0.5)
    late = traffic.requests[-1]
    assert (late.at, late.seconds, late.besides) == pytest.approx((6.5, 1.0, 0.7))
    traffic.ended(8.0, [found[0], QueryFailed("lost")])
    assert traffic.requests[-1].seconds is None
    traffic.ended(9.0, [QueryFailed("cancelled")], read=0.5)
    assert len(traffic.requests) == 3
    assert list(traffic.unserved) == [(8.5, CANCELLED)]


def test_memory_is_bounded() -> None:
    traffic = Traffic()
    for _ in range(REQUESTS + 10):
        ended(traffic, 0.1)
    assert len(traffic.requests) == REQUESTS


def test_a_slow_request_does_not_bring_back_a_time_of_which_the_others_are_forgotten() -> None:
    spec = TensorSpec("x", "FP32", (1,))
    model = OwnModel("m", Signature((spec,), (spec,)))
    front = FrontEnd(model, Silent(), Rules(1, POLICIES["uncoded"]), deadline=60.0)
    traffic, base = front.times.traffic, time.monotonic() - 100
    for number in range(8 * REQUESTS // 5):  # a thousand a second
        if number == 15_000:
            ended(traffic, 10.0, at=base + 5)
        ended(traffic, 0.05, at=base + number / 1000)
    times = [row[0] for row in told(front, Known())["requests"]]
    assert REQUESTS - 1 <= len(times) <= REQUESTS
    assert max(np.diff(np.sort(times))) < 2.0


def test_requests_that_all_take_long_are_all_told() -> None:
    traffic = Traffic()
    for number in range(REQUESTS + 10):
        ended(traffic, 60.0, at=number / 1000)
    assert len(traffic.gapless()) >= REQUESTS - 1


def test_a_worker_that_is_avoided_is_remembered() -> None:
    traffic = Traffic()
    for number in range(OWN + 5):
        traffic.did(7, 0, 0.3 + number / 1000, 0.0)
    traffic.did(7, 4, 0.9, 0.0)  # not a data task
    assert traffic.earlier() == []
    for number in range(TASKS):
        traffic.did(number % 2, 0, 0.1, 0.0)
    found = traffic.earlier()
    assert [task.worker for task in found] == [7] * OWN
    assert [round(1000 * task.occupied) for task in found] == list(range(305, 305 + OWN))
    traffic.did(7, 0, 0.3, 0.0)
    assert len(traffic.earlier()) == OWN - 1


def test_what_came_lately() -> None:
    traffic = Traffic()
    assert traffic.lately(5.0, 0.1) is None
    ended(traffic, 9.0, at=time.monotonic() - 60)  # long ago
    for _ in range(99):
        ended(traffic, 0.1, 0.2)
    ended(traffic, 0.1, 3.0)
    for _ in range(100):
        traffic.did(0, 0, 0.1, 0.0)
    traffic.did(0, 4, 0.2, 0.0)
    traffic.did_several(0, 1.0, 0.0)
    found = traffic.lately(5.0, 0.1)
    assert found == {"p50": 200.0, "p99": 200.0, "work": 0.56}
    assert traffic.lately(5.0, 0.0) is None  # what a task takes is not known yet


class Silent:
    """A pool whose workers never answer."""

    on_death: Death | None = None

    async def start(self, size: int) -> None:
        """There is nothing to start."""

    async def call(self, worker: int, task: Task) -> Result:
        await asyncio.Event().wait()
        raise AssertionError

    async def replace(self, worker: int) -> None:
        """There is nothing to replace."""

    async def stop(self) -> None:
        """There is nothing to stop."""

    def pid(self, worker: int) -> int | None:
        return None


async def test_what_is_refused_or_cancelled_is_told() -> None:
    spec = TensorSpec("x", "FP32", (1,))
    model = OwnModel("m", Signature((spec,), (spec,)))
    front = FrontEnd(model, Silent(), Rules(1, POLICIES["uncoded"], max_pending=2), deadline=60.0)
    await front.start()
    query = {"x": np.zeros((1, 1), np.float32)}
    gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    one = asyncio.create_task(front.infer([query]))
    other = asyncio.create_task(front.infer([query], gone=gone))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await front.infer([query])
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    gone.set_result(None)
    (failed,) = await other
    assert isinstance(failed, QueryFailed)
    found = told(front, Known())
    assert [why for _, why in found["unserved"]] == [REFUSED, CANCELLED, CANCELLED]
    assert found["requests"] == []
    assert found["encode_share"] is None  # where nothing is known, as of a gateway
    await front.stop()


def test_what_workers_did_that_are_gone_is_left_out() -> None:
    """One that is being replaced still counts."""
    spec = TensorSpec("x", "FP32", (1,))
    model = OwnModel("m", Signature((spec,), (spec,)))
    front = FrontEnd(model, Silent(), Rules(len(STATES), POLICIES["uncoded"]), deadline=60.0)
    traffic = front.times.traffic
    for newest in (False, True):
        for worker, state in enumerate(STATES):
            front.workers[worker].state = state
            traffic.did(worker, 0, 0.0, 0.0)
            if newest:
                front.supervisor.losses.append(Loss(time.monotonic(), worker, "died", 0.3))
        if not newest:
            traffic.tasks.clear()
    found = told(front, Known())
    there = set(range(len(STATES))) - {STATES.index(ABSENT), STATES.index(GIVEN_UP)}
    for name in ("tasks", "earlier", "losses"):
        assert {row[1] for row in found[name]} == there, name
