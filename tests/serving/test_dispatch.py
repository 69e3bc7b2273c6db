"""The front end over workers that are threads of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.faults import Fault
from codedinvnet.models.bundle import Bundle
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.serving.answers import QueryFailed
from codedinvnet.serving.workers.faults import Schedule
from tests.observing import counted, until
from tests.serving.bundles import probabilities
from tests.serving.front import (
    PATIENCE,
    K,
    Released,
    answered,
    assert_decoded,
    decoded,
    direct,
    fixed_size,
    running,
)


@pytest.mark.parametrize("policy", POLICIES)
async def test_direct_answers_are_the_offline_ones(
    policy: str, mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method, policy=policy) as (front, _):
        batch = images[:11]  # two whole groups and three of the next
        # On a busy machine an answer may be so late that its decoding is faster.
        answers = answered(await front.ask(batch, accept_decoded=False))
        expected = direct(mnist, batch)
        for answer, row in zip(answers, expected, strict=True):
            assert answer.outcome == "direct"
            assert 0 < answer.seconds < PATIENCE
            np.testing.assert_allclose(probabilities(answer), row, atol=1e-5)
            assert probabilities(answer).dtype == np.float32


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 1, 1, 1)])
async def test_requests_share_a_group_whether_images_come_as_bytes_or_floats(
    sizes: tuple[int, ...], mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method, group_timeout=PATIENCE) as (front, pool):
        pool.hang(1)
        requests, first = [], 0
        for number, size in enumerate(sizes):
            batch = images[first : first + size]
            floats = (batch / 255).astype(np.float32)
            requests.append(front.ask(batch if number % 2 else floats))
            first += size
        answers = [a for found in await asyncio.gather(*requests) for a in answered(found)]
        assert_decoded(answers[1], decoded(mnist, images[:K], 1))
        expected = direct(mnist, images[:1])[0]
        np.testing.assert_allclose(probabilities(answers[0]), expected, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
async def test_short_groups_with_and_without_fillers(
    fixed: bool, mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    code = fixed_size(method) if fixed else method
    pool = Released(code)
    async with running(code, pool=pool, group_timeout=0.1) as (front, _):
        query = asyncio.create_task(front.ask(images[:3]))
        await until(lambda: any(number == K for _, number in pool.calls))
        for number in (0, 2, K):
            pool.gates[number].set()
        answers = answered(await query)
        size = K if fixed else 3
        group = np.zeros((size, 1, 28, 28), np.uint8)
        group[:3] = images[:3]
        assert_decoded(answers[1], decoded(mnist, group, 1))
        assert counted(front.metrics.groups.labels(str(size))) == 1
        assert sorted(number for _, number in pool.calls) == [0, 1, 2, K]
        pool.gates[1].set()


async def test_a_held_answer_leaves_the_worker_free(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    hold = Fault(kind="hold", worker=0, delay=Distribution(ms=1500))
    async with running(method, schedule=Schedule(faults=(hold,)), policy="uncoded") as (
        front,
        pool,
    ):
        slow = asyncio.create_task(front.ask(images[:1]))
        await until(lambda: (0, 0) in pool.calls)
        await until(lambda: front.scheduler.load(0) == 0)
        assert not slow.done()
        (answer,) = answered(await slow)
        assert answer.seconds >= 1.5
        np.testing.assert_allclose(probabilities(answer), direct(mnist, images[:1])[0], atol=1e-5)


async def test_what_waits_for_a_worker_is_computed_in_one_call(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    batch = images[:9]
    async with running(method, policy="uncoded", workers=1, worker_batch=4) as (front, pool):
        answers = answered(await front.ask(batch))
        assert len(pool.calls) == 3
        for answer, row in zip(answers, direct(mnist, batch), strict=True):
            np.testing.assert_allclose(probabilities(answer), row, atol=1e-5)
        assert counted(front.metrics.tasks.labels("data")) == 9
        pool.hang(0)
        asked = asyncio.create_task(front.ask(batch[:2]))
        await until(lambda: len(pool.calls) == 4)
        pool.kill(0)
        for answer, row in zip(answered(await asked), direct(mnist, batch), strict=False):
            np.testing.assert_allclose(probabilities(answer), row, atol=1e-5)
        assert len(pool.calls) == 6  # each is computed by itself


async def test_a_query_that_cannot_be_computed_fails_alone(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = images[:6].copy()
    batch[2] = 7
    async with running(method, policy="uncoded", workers=2, worker_batch=6) as (front, pool):
        compute = pool.computer.compute

        def poisoned(number: int, inputs: Mapping[str, np.ndarray]) -> Any:
            if any((row == 7).all() for rows in inputs.values() for row in rows):
                raise ValueError("seven")
            return compute(number, inputs)

        monkeypatch.setattr(pool.computer, "compute", poisoned)
        found = await front.ask(batch)
        assert [isinstance(one, QueryFailed) for one in found] == [i == 2 for i in range(6)]
        failures = (front.metrics.task_failures.labels(str(worker)) for worker in range(2))
        assert counted(front.metrics.tasks.labels("data")) == 5 + sum(map(counted, failures))
