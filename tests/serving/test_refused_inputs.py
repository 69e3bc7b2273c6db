"""Inputs on which a model fails, in pools that don't say so, and workers that fail on all."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.serving.answers import Answered, InputRefused
from codedinvnet.serving.workers.pool import Result, Task, WorkerFailed, run_task
from tests.serving.bundles import BundlePool
from tests.serving.front import running

WORKERS = 6


class Choosy(BundlePool):
    """Every worker fails on white images."""

    async def _work(self, worker: int, task: Task) -> Result:
        if (task.inputs["images"] == 255).all():
            raise WorkerFailed("it is too bright")
        return await super()._work(worker, task)


async def test_what_two_workers_fail_on_is_the_inputs_fault(
    method: Scheme, images: np.ndarray
) -> None:
    white = np.full_like(images[:1], 255)
    async with running(method, pool=Choosy(method), workers=WORKERS) as (front, pool):
        for _ in range(5):  # every worker has done a task
            await front.ask(images[:12])
        pool.calls.clear()
        for _ in range(3):
            (found,) = await front.ask(white)
            assert isinstance(found, InputRefused)
            assert "too bright" in str(found)
        data = [worker for worker, number in pool.calls if number < method.rules.k]
        assert len(data) <= 6
        (found,) = await front.ask(images[:1])
        assert isinstance(found, Answered)
        assert front.scheduler.workers_up == WORKERS


async def test_what_one_worker_fails_on_is_its_own_fault(
    method: Scheme, images: np.ndarray
) -> None:
    async with running(method, workers=WORKERS) as (front, pool):
        pool.broken = {0, 1}
        for image in images[:12]:
            (found,) = await front.ask(image[None])
            assert isinstance(found, Answered)


class Halves:
    """Fails on values above a half, or on all."""

    def __init__(self, always: bool) -> None:
        self.always = always

    def compute(self, number: int, inputs: object) -> tuple[dict[str, np.ndarray], float]:
        (x,) = inputs.values()  # type: ignore[attr-defined]
        if self.always or (x > 0.5).any():
            raise IndexError("out of range")
        return {"y": x}, 0.0


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_says_whether_the_input_is_to_blame(always: bool) -> None:
    kind = IndexError if always else Exception
    with pytest.raises(kind, match="out of range") as raised:
        run_task(Halves(always), 0, {"x": np.ones((1, 3))})
    assert (type(raised.value).__name__ == "InputRefused") != always
