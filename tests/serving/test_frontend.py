"""The front end over workers that are threads of this process, which die and hang on request."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.mean import MeanCode
from codedinvnet.codes.rules import Parities
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import Bundle
from codedinvnet.serving import decoding, frontend, supervisor, views
from codedinvnet.serving.answers import (
    Answered,
    DeadlinePassed,
    Draining,
    Overloaded,
    QueryFailed,
    Starting,
)
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.logs import logger
from codedinvnet.serving.rules.actions import Action, Complete
from codedinvnet.serving.rules.group import FILLER
from codedinvnet.serving.rules.settings import POLICIES, Rules
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.faults import Delay, Fault, FaultyPool, Schedule
from codedinvnet.serving.workers.pool import Task, WorkerDied, WorkerFailed
from codedinvnet.serving.workers.result import Result, run_task
from tests.serving.bundles import BundleFront, BundlePool, output, probabilities, with_output

K, WORKERS = 4, 6
PATIENCE = 60.0
"""A deadline that is never in the way."""


@pytest.fixture(scope="module")
def method(mnist: Bundle) -> Scheme:
    return scheme_for(mnist, K)


@asynccontextmanager
async def running(
    method: Scheme,
    *,
    pool: BundlePool | None = None,
    schedule: Schedule | None = None,
    policy: str = "coded",
    deadline: float = PATIENCE,
    min_confidence: float = 0.0,
    down_timeout: float = PATIENCE,
    **rules: Any,
) -> AsyncIterator[tuple[BundleFront, BundlePool]]:
    """Run a front end; in the end nothing of any query may be left in it."""
    before = asyncio.all_tasks()
    pool = pool or BundlePool(method)
    rules = {"workers": WORKERS, "group_timeout": 0.05, "hang_timeout": PATIENCE, **rules}
    front = BundleFront(
        method,
        pool if schedule is None else FaultyPool(pool, schedule),
        Rules(policy=POLICIES[policy], **rules),
        deadline=deadline,
        min_confidence=min_confidence,
        down_timeout=down_timeout,
    )
    await front.start()
    try:
        yield front, pool
        for worker, event in enumerate(pool.hung):
            if event.is_set():  # else its task would be waited for
                pool.kill(worker)
        if not front.stopped:
            await until(lambda: leftovers(front) == {})
    finally:
        await front.stop()
    await until(lambda: asyncio.all_tasks() <= before)


def queue(front: FrontEnd) -> decoding.DecodingQueue:
    assert isinstance(front.decoding, decoding.DecodingQueue)
    return front.decoding


def leftovers(front: BundleFront) -> dict[str, Any]:
    scheduler = front.scheduler
    kept = {
        "waiting": dict(front.waiting),
        "inputs": front._inputs,
        "outputs": front._outputs,
        "jobs": queue(front)._jobs,
        "queries": scheduler.queries,
        "attempts": scheduler.attempts,
        "tasks": scheduler.waiting,
        "groups": scheduler.groups,
        "computed_by": scheduler.computed_by,
    }
    return {name: things for name, things in kept.items() if things}


async def until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def answered(found: list[Answered | QueryFailed]) -> list[Answered]:
    answers = [answer for answer in found if isinstance(answer, Answered)]
    assert len(answers) == len(found), found
    return answers


def direct(bundle: Bundle, batch: np.ndarray) -> np.ndarray:
    return bundle.classify(bundle.embed(torch.from_numpy(batch))).numpy()


def decoded(bundle: Bundle, batch: np.ndarray, missing: int) -> np.ndarray:
    """Return what `Bundle.decode` makes of a group whose member is missing."""
    group = torch.from_numpy(batch)
    others = [i for i in range(len(batch)) if i != missing]
    latents = bundle.embed(group[others])[None]
    return bundle.decode(bundle.encode(group[None]), latents, missing)[0].numpy()


def assert_decoded(answer: Answered, expected: np.ndarray, outcome: str = "decoded") -> None:
    assert answer.outcome == outcome
    assert int(probabilities(answer).argmax()) == int(expected.argmax())
    np.testing.assert_allclose(probabilities(answer), expected, atol=1e-4)


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


@pytest.mark.parametrize("missing", range(K))
async def test_a_hung_workers_query_is_decoded(
    missing: int, mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method) as (front, pool):
        pool.hang(missing)
        answers = answered(await front.ask(images[:K]))
        assert_decoded(answers[missing], decoded(mnist, images[:K], missing))
        for i in set(range(K)) - {missing}:
            assert answers[i].outcome == "direct"


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


async def test_a_broken_workers_query_is_decoded_and_the_worker_stays(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method) as (front, pool):
        pool.broken.add(1)
        answers = answered(await front.ask(images[:K]))
        assert_decoded(answers[1], decoded(mnist, images[:K], 1))
        assert front.workers[1].restarts == 0


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


@pytest.mark.parametrize("good", [False, True])
async def test_bad_queries_cost_no_worker_its_place(
    good: bool, method: Scheme, images: np.ndarray
) -> None:
    class Choosy(BundlePool):
        async def _work(self, worker: int, task: Task) -> Result:
            if (task.inputs[IMAGES] == 255).all((1, 2, 3)).any():
                raise WorkerFailed("white")
            return await super()._work(worker, task)

    white = np.full_like(images[: 2 * K], 255)
    async with running(method, pool=Choosy(method)) as (front, _):
        for _ in range(WORKERS):
            if good:
                answered(await front.ask(images[:1]))
            found = await front.ask(white)
            assert all(isinstance(problem, QueryFailed) for problem in found)
        assert [view.restarts + view.deaths for view in front.workers] == [0] * WORKERS


async def test_direct_answers_when_decoded_ones_will_not_do(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method) as (front, pool):
        pool.broken.add(1)
        answers = answered(await front.ask(images[:K], accept_decoded=False))
        assert [answer.outcome for answer in answers] == ["direct"] * K
        found = np.stack([probabilities(answer) for answer in answers])
        np.testing.assert_allclose(found, direct(mnist, images[:K]), atol=1e-5)


@pytest.mark.parametrize("lost", [(0, 1), (1, 4), (0, 2, 3, 4)])
async def test_several_lost(
    lost: tuple[int, ...], mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method) as (front, pool):
        for worker in lost:
            pool.hang(worker)
        query = asyncio.create_task(front.ask(images[:K]))
        await until(lambda: len(pool.calls) == K + 1)
        for worker in lost:
            pool.kill(worker)
        answers = answered(await query)
        labels = [int(probabilities(answer).argmax()) for answer in answers]
        for i, answer in enumerate(answers):
            if answer.outcome == "direct":
                assert labels[i] == int(direct(mnist, images[[i]])[0].argmax())
            else:
                assert_decoded(answer, decoded(mnist, images[:K], i))
        await until(lambda: all(front.workers[i].restarts == 1 for i in lost))


async def test_all_lost_and_back(method: Scheme, images: np.ndarray) -> None:
    async with running(method) as (front, pool):
        for worker in range(WORKERS):
            pool.hang(worker)
        query = asyncio.create_task(front.ask(images[: 2 * K]))
        await until(lambda: len(pool.calls) >= WORKERS)
        for worker in range(WORKERS):
            pool.kill(worker)
        assert front.scheduler.workers_up == 0
        late = asyncio.create_task(front.ask(images[2 * K : 3 * K]))
        answered(await query)
        answered(await late)
        assert front.scheduler.workers_up == WORKERS
        assert [view.restarts for view in front.workers] == [1] * WORKERS


async def test_a_hung_worker_is_replaced_after_a_time(method: Scheme, images: np.ndarray) -> None:
    async with running(method, policy="uncoded", hang_timeout=1.0) as (front, pool):
        pool.hang(0)
        (answer,) = answered(await front.ask(images[:1]))
        assert answer.outcome == "direct"
        assert answer.seconds >= 1.0
        await until(lambda: front.workers[0].restarts == 1)
        restarts = front.metrics.restarts.labels("hung")
        assert restarts._value.get() == 1


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


async def test_a_query_on_which_every_worker_fails(method: Scheme, images: np.ndarray) -> None:
    async with running(method) as (front, pool):
        pool.broken = set(range(WORKERS))
        found = await front.ask(images[:K])
        for problem in found:
            assert isinstance(problem, QueryFailed)
            assert not isinstance(problem, DeadlinePassed)
            assert "this worker is broken" in str(problem)
        pool.broken = set()
        answered(await front.ask(images[:K]))


@pytest.mark.parametrize("per_request", [False, True])
async def test_deadline(per_request: bool, method: Scheme, images: np.ndarray) -> None:
    deadline = PATIENCE if per_request else 0.3
    async with running(method, deadline=deadline) as (front, pool):
        for worker in range(WORKERS):
            pool.hang(worker)
        began = time.monotonic()
        found = await front.ask(images[: K + 1], deadline=0.3 if per_request else 50.0)
        assert 0.3 <= time.monotonic() - began < 20
        assert all(isinstance(problem, DeadlinePassed) for problem in found)
        assert front.metrics.queries.labels("deadline")._value.get() == K + 1


async def refused(front: BundleFront, batch: np.ndarray) -> None:
    """Check that a batch is refused, and not taken and waited for."""
    with pytest.raises(Overloaded):
        await asyncio.wait_for(front.ask(batch), 5)


async def test_overload(method: Scheme, images: np.ndarray) -> None:
    async with running(method, max_pending=8) as (front, pool):
        for worker in range(WORKERS):
            pool.hang(worker)
        accepted = [asyncio.create_task(front.ask(images[i : i + 4])) for i in (0, 4)]
        await until(lambda: len(front.waiting) == 8)
        for batch in (images[:1], images[:4]):
            await refused(front, batch)
        assert front.metrics.queries.labels("rejected")._value.get() == 5
        assert len(front.waiting) == 8
        for worker in range(WORKERS):
            pool.kill(worker)
        for task in accepted:
            answered(await task)
        answered(await front.ask(images[:8]))
        await refused(front, images[:9])  # all or none


async def test_a_decoder_that_falls_behind_is_overload(method: Scheme, images: np.ndarray) -> None:
    async with running(method, max_pending=4) as (front, _):
        busy = threading.Event()
        queue(front).thread.submit(busy.wait)
        try:
            accepted = asyncio.create_task(front.ask(images[:4]))
            await until(lambda: bool(front.waiting) and not front.scheduler.queries)
            await refused(front, images[:1])
        finally:
            busy.set()
        answered(await accepted)
        answered(await front.ask(images[:4]))


@pytest.mark.parametrize("wrong", ["shape", "nan"])
async def test_an_output_that_cannot_be_decoded_is_lost_alone(
    wrong: str, mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    class Foreign(BundlePool):
        async def _work(self, worker: int, task: Task) -> Result:
            result = await super()._work(worker, task)
            if worker != 0:
                return result
            bad = output(result)[:1] if wrong == "shape" else np.full_like(output(result), np.nan)
            return with_output(result, bad)

    async with running(method, pool=Foreign(method), routing="round-robin") as (front, _):
        for start in range(0, 24, K):
            batch = images[start : start + K]
            for row, answer in enumerate(answered(await front.ask(batch))):
                assert np.isfinite(probabilities(answer)).all()
                if answer.outcome == "direct":
                    np.testing.assert_allclose(
                        probabilities(answer), direct(mnist, batch)[row], atol=1e-5
                    )


class Absurd(BundlePool):
    """One worker's outputs are finite, and no head can do anything with them."""

    async def _work(self, worker: int, task: Task) -> Result:
        result = await super()._work(worker, task)
        if worker != 0:
            return result
        return with_output(result, np.full_like(output(result), 3e38))


@pytest.mark.parametrize("decoded", [False, True])
async def test_an_answer_that_is_not_finite_is_none(
    decoded: bool, method: Scheme, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger.name):
        async with running(method, pool=Absurd(method), routing="round-robin") as (front, pool):
            if decoded:
                pool.hang(1)
            found = await front.ask(images[:K], accept_decoded=decoded, name="seven")
            bad = [f for f in found if isinstance(f, QueryFailed)]
            assert [str(problem) for problem in bad] == [
                "decoding failed: the result is not finite"
            ] * (1 + decoded)
            for answer in found[1 + decoded :]:
                assert isinstance(answer, Answered)
                assert np.isfinite(probabilities(answer)).all()
    told = [vars(r)["fields"] for r in caplog.records if r.message == "query failed"]
    assert [fields["id"] for fields in told] == ["seven"]  # the second one within a second is not


async def test_a_parity_of_another_shape_is_lost_and_computed_again(
    method: Scheme, images: np.ndarray
) -> None:
    """A worker may have another bundle in its folder."""
    foreign: list[int] = []

    class Foreign(BundlePool):
        async def _work(self, worker: int, task: Task) -> Result:
            result = await super()._work(worker, task)
            if task.number != K or foreign:
                return result
            foreign.append(worker)
            return with_output(result, output(result)[:-1])

    async with running(method, pool=Foreign(method), routing="round-robin") as (front, pool):
        pool.hang(0)
        found = answered(await front.ask(images[:K]))
        assert [answer.outcome for answer in found] == ["decoded", *["direct"] * (K - 1)]
        tasks = front.metrics.registry.get_sample_value
        assert tasks("codedinvnet_tasks_total", {"task": "parity"}) == 2
    assert foreign


async def test_busy_workers_are_not_taken_for_hung_after_a_stall(
    method: Scheme, images: np.ndarray
) -> None:
    class Slow(BundlePool):
        async def _work(self, worker: int, task: Task) -> Result:
            def work() -> Result:
                time.sleep(0.3)
                return run_task(self.computer, task.number, task.inputs)

            return await asyncio.to_thread(work)

    async with running(method, pool=Slow(method), hang_timeout=0.8) as (front, _):
        query = asyncio.create_task(front.ask(images[:K]))
        await until(lambda: any(map(front.scheduler.load, range(WORKERS))))
        time.sleep(1.6)  # the answers come meanwhile
        answered(await query)
        assert [view.restarts + view.deaths for view in front.workers] == [0] * WORKERS


async def test_drain(method: Scheme, images: np.ndarray) -> None:
    async with running(method) as (front, pool):
        pool.hang(0)
        pool.hang(1)
        query = asyncio.create_task(front.ask(images[: K + 2]))
        await until(lambda: len(pool.calls) >= K + 1)
        assert front.ready
        drained = asyncio.create_task(front.drain())
        await asyncio.sleep(0.05)
        assert not front.ready
        assert not drained.done()
        with pytest.raises(Draining):
            await front.ask(images[:1])
        pool.kill(0)
        pool.kill(1)
        await drained
        answered(await query)


async def test_draining_is_announced_once_and_at_the_signal(
    method: Scheme, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """The server waits for its connections first, and only then has the front end drained."""

    with caplog.at_level("INFO", logger.name):
        async with running(method) as (front, pool):
            pool.hang(0)
            query = asyncio.create_task(front.ask(images[:1]))
            await until(lambda: len(pool.calls) == 1)
            front.announce_draining()
            assert front.ready
            pool.kill(0)
            answered(await query)
            await front.drain()
    (draining,) = [vars(r)["fields"] for r in caplog.records if r.message == "draining"]
    assert draining == {"pending": 1}


async def test_stopping_twice_and_with_a_query_under_way(
    method: Scheme, images: np.ndarray
) -> None:
    async with running(method) as (front, _):
        query = asyncio.create_task(front.ask(images[:6]))
        await asyncio.sleep(0)
        await front.stop()
        answered(await query)
        await front.stop()


class TestConfidence:
    """Decoded answers below `min_confidence` are checked by a copy, if the policy has copies."""

    NEVER_SURE = 1.01

    async def test_copy(self, mnist: Bundle, method: Scheme, images: np.ndarray) -> None:
        async with running(
            method, policy="coded+hedge", min_confidence=self.NEVER_SURE, hedge_share=1.0
        ) as (front, pool):
            pool.hang(2)
            answers = answered(await front.ask(images[:K]))
            assert [answer.outcome for answer in answers] == ["direct"] * K
            expected = direct(mnist, images[[2]])[0]
            np.testing.assert_allclose(probabilities(answers[2]), expected, atol=1e-5)
            assert sum(number == 2 for _, number in pool.calls) == 2
            assert front.scheduler.hedges >= 1
            for _ in range(2):
                front.update_gauges()
            count = front.metrics.registry.get_sample_value("codedinvnet_hedges_total")
            assert count == front.scheduler.hedges

    @pytest.mark.parametrize(
        ("policy", "share", "threshold"),
        [("coded", 1.0, NEVER_SURE), ("coded+hedge", 0.0, NEVER_SURE), ("coded+hedge", 1.0, 0.0)],
        ids=["no copies", "no budget", "sure"],
    )
    async def test_no_copy(
        self,
        policy: str,
        share: float,
        threshold: float,
        mnist: Bundle,
        method: Scheme,
        images: np.ndarray,
    ) -> None:
        async with running(method, policy=policy, min_confidence=threshold, hedge_share=share) as (
            front,
            pool,
        ):
            pool.hang(2)
            answers = answered(await front.ask(images[:K]))
            assert_decoded(answers[2], decoded(mnist, images[:K], 2))
            assert sum(number == 2 for _, number in pool.calls) == 1

    @pytest.mark.parametrize("end", ["deadline", "death"])
    async def test_the_copy_is_lost_too(
        self, end: str, mnist: Bundle, method: Scheme, images: np.ndarray
    ) -> None:
        async with running(
            method, policy="coded+hedge", min_confidence=self.NEVER_SURE, hedge_share=1.0
        ) as (front, pool):
            pool.hang(2)
            pool.hang(5)  # where the copy goes: no other worker is new to the group
            deadline = 3.0 if end == "deadline" else PATIENCE
            query = asyncio.create_task(front.ask(images[:K], deadline=deadline))
            await until(lambda: (5, 2) in pool.calls)
            if end == "death":
                pool.kill(2)
                pool.kill(5)
            answers = answered(await query)
            assert_decoded(answers[2], decoded(mnist, images[:K], 2))


async def test_float_images(mnist: Bundle, method: Scheme, images: np.ndarray) -> None:
    floats = (images[:K] / 255).astype(np.float32)
    async with running(method) as (front, pool):
        pool.hang(1)
        answers = answered(await front.ask(floats))
        assert_decoded(answers[1], decoded(mnist, images[:K], 1))
        np.testing.assert_allclose(
            probabilities(answers[0]), direct(mnist, images[:1])[0], atol=1e-5
        )


async def test_float_and_byte_images_share_a_group(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method, group_timeout=PATIENCE) as (front, pool):
        pool.hang(0)
        floats = (images[:2] / 255).astype(np.float32)
        both = await asyncio.gather(front.ask(floats), front.ask(images[2:4]))
        answers = [answer for found in both for answer in answered(found)]
        assert_decoded(answers[0], decoded(mnist, images[:K], 0))


async def test_one_query_each_shares_a_group(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method, group_timeout=PATIENCE) as (front, pool):
        pool.hang(3)
        found = await asyncio.gather(*[front.ask(images[[i]]) for i in range(K)])
        answers = [answer for one in found for answer in answered(one)]
        assert_decoded(answers[3], decoded(mnist, images[:K], 3))


async def test_a_short_group_needs_no_fillers(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    async with running(method, group_timeout=0.1) as (front, pool):
        for worker in range(3):
            pool.hang(worker)  # all three are late, so all three are coded
        query = asyncio.create_task(front.ask(images[:3]))
        await until(lambda: any(number == K for _, number in pool.calls))
        assert len(pool.calls) == 4  # three members and the parity
        pool.hung[0].clear()
        pool.hung[2].clear()
        for worker in (0, 2):
            pool.kill(worker)
        answers = answered(await query)
        assert front.metrics.groups.labels("3")._value.get() == 1
        for i, answer in enumerate(answers):
            if answer.outcome == "decoded":
                assert_decoded(answer, decoded(mnist, images[:3], i))


class Released(BundlePool):
    """Workers that answer when they are let."""

    def __init__(self, method: Scheme) -> None:
        super().__init__(method)
        self.gates = {number: asyncio.Event() for number in range(K + 1)}

    async def _work(self, worker: int, task: Task) -> Result:
        await self.gates[task.number].wait()
        return run_task(self.computer, task.number, task.inputs)


def fixed_size(scheme: Scheme) -> Scheme:
    """Return the same code, as if it could not serve short groups."""
    code = copy.copy(scheme.code)
    code.rules = Parities(K, fixed_size=True, guesses=code.rules.guesses)
    return replace(scheme, code=code)


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
        assert front.metrics.groups.labels(str(size))._value.get() == 1
        assert sorted(number for _, number in pool.calls) == [0, 1, 2, K]
        pool.gates[1].set()


async def test_where_nobody_gets_anything_done_no_worker_is_to_blame(
    method: Scheme,
) -> None:
    async with running(method) as (front, _):
        for other in front.workers[1:]:
            other.failed.append((100 + id(other),))
        is_broken = front.supervisor.is_broken
        blamed = [is_broken(0, (query,)) for query in range(supervisor.MOST_FAILURES)]
        assert not any(blamed)
        front.workers[1].failed.clear()  # it has done one
        assert front.supervisor.is_broken(0, (supervisor.MOST_FAILURES - 1,))


async def test_at_the_deadline_side_features_answer(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    pool = Released(method)
    async with running(method, pool=pool) as (front, _):
        began = time.monotonic()
        query = asyncio.create_task(front.ask(images[:K], deadline=0.5))
        await until(lambda: len(pool.calls) == K + 1)
        for number in (0, K):
            pool.gates[number].set()
        first, *others = answered(await query)
        assert time.monotonic() - began >= 0.5, "better answers might have come"
        assert first.outcome == "direct"
        assert front.metrics.queries.labels("guessed")._value.get() == K - 1
        side = mnist.encode(torch.from_numpy(images[None, :K])).side
        for member, answer in enumerate(others, start=1):
            logits = mnist.model.recover_from_side(side[:, member])
            assert_decoded(answer, logits.softmax(1)[0].numpy(), "guessed")
        for gate in pool.gates.values():
            gate.set()


def note_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the members that are decoded for a check, as they come."""
    chosen: list[int] = []

    def checked(*arguments: Any) -> tuple[bool, None]:
        chosen.append(arguments[-1])
        return True, None

    monkeypatch.setattr(decoding, "check_group", checked)
    return chosen


async def test_agreement_is_not_measured_on_fillers(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    chosen = note_checks(monkeypatch)

    async with running(fixed_size(method)) as (front, _):
        outputs = {0: FILLER, 1: FILLER, 2: FILLER, 3: FILLER, K: FILLER}
        for _ in range(40):
            front._do([Complete(0, K, outputs, workers={0: 3, 1: 5, K: 2})])
            await until(lambda: not queue(front)._running)
        assert len(chosen) == 40
    assert set(chosen) == {0, 1}


async def test_at_most_half_of_the_groups_are_checked(
    method: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = note_checks(monkeypatch)

    async with running(fixed_size(method)) as (front, _):
        for _ in range(200):
            front._do([Complete(0, K, {0: FILLER, K: FILLER}, workers={0: 3, K: 2})])
            await until(lambda: not queue(front)._running)
    assert 70 <= len(chosen) <= 130


async def test_answers_do_not_wait_for_checks(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    go_on = threading.Event()
    waiting: list[int] = []

    async with running(method) as (front, _):

        def slowly(*_: Any) -> tuple[bool, None]:
            waiting.append(len(front.waiting))
            assert go_on.wait(30)
            return True, None

        monkeypatch.setattr(decoding, "check_group", slowly)
        answered(await front.ask(images[:K]))
        await until(lambda: len(waiting) == 1)  # the decoder is at it
        batch = asyncio.ensure_future(front.ask(images[: 10 * K]))
        await until(lambda: len({q for job in queue(front)._jobs for q in job.wanted}) == 10 * K)
        # How many of them are complete is a matter of time: a late member is decoded.
        batches = [batch]
        for _ in range(100):
            if len(queue(front)._checks) == decoding.WAITING_CHECKS:
                break
            batches.append(asyncio.ensure_future(front.ask(images[:K])))
            await asyncio.sleep(0.1)
        assert len(queue(front)._checks) == decoding.WAITING_CHECKS
        go_on.set()
        for each in batches:
            answered(await each)
        await until(lambda: len(waiting) >= 1 + decoding.WAITING_CHECKS)
        assert waiting == [0] * len(waiting)


async def test_a_check_that_fails_is_logged_and_answers_go_on(
    method: Scheme,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("of the check")

    monkeypatch.setattr(decoding, "check_group", fails)

    async with running(method) as (front, _):
        for _ in range(3):
            answered(await front.ask(images[:K]))
        await until(lambda: "internal error" in caplog.text)
        answered(await front.ask(images[:K]))
    assert caplog.records[-1].__dict__["fields"]["reason"] == "ZeroDivisionError: of the check"


async def test_what_is_too_late_already_is_not_computed(method: Scheme, images: np.ndarray) -> None:
    async with running(method) as (front, pool):
        began = time.monotonic() - 1
        found = await front.ask(images[:K], deadline=0.9, began=began)
        assert [type(one) for one in found] == [DeadlinePassed] * K
        assert front.metrics.queries.labels("deadline")._value.get() == K
        assert pool.calls == []


def test_live_agreement_and_the_residual_of_a_corrupt_worker(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)

    async def run(schedule: Schedule) -> BundleFront:
        async with running(method, schedule=schedule, routing="round-robin") as (front, _):
            for start in range(0, 240, 2 * K):
                answered(await front.ask(images[start : start + 2 * K]))
            checks = front.metrics.agreement_checks
            await until(lambda: checks._value.get() >= 20)
        return front

    honest = asyncio.run(run(Schedule()))
    agreement = honest.metrics.live_agreement()
    assert agreement is not None
    assert agreement >= 0.9
    fair = honest.metrics._residuals
    assert {worker for worker, role in fair if role == "parity"} == set(range(WORKERS))

    corrupt = Fault(kind="corrupt", worker=3, scale=5.0)
    lied = asyncio.run(run(Schedule(faults=(corrupt,)))).metrics._residuals
    assert lied[3, "parity"] > 2 * max(fair.values())
    assert lied[3, "parity"] > max(v for (w, r), v in lied.items() if r == "parity" and w != 3)


async def test_a_held_answer_leaves_the_worker_free(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    hold = Fault(kind="hold", worker=0, delay=Delay(ms=1500))
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
        assert front.times.tasks[0].values[0] >= 1.5  # until its answer was here
        np.testing.assert_allclose(probabilities(answer), direct(mnist, images[:1])[0], atol=1e-5)


async def test_times_are_split_as_a_scenario_splits_them(
    method: Scheme, images: np.ndarray
) -> None:
    """What faults block a worker for is neither computing nor a trip."""
    slow = Fault(kind="slow", delay=Delay(ms=30))

    async with running(method, schedule=Schedule(faults=(slow,))) as (front, _):
        found = answered(await front.ask(images[:K]))
        assert all(0.03 <= answer.work_seconds <= answer.seconds for answer in found)
        times = front.times  # on a busy machine the last worker comes behind the answers
        await until(lambda: times.service.seen == K and times.encode.seen == 1)
        assert times.trip.seen == K + 1
        assert all(value > 0 for value in times.service.values)
        measured = front.metrics.registry.get_sample_value
        encode = measured("codedinvnet_encode_seconds_sum")
        assert times.encode.values == [pytest.approx((encode or 0.0) / K)]
        assert min(times.trip.values) < 0.03
        tasks = [value for worker in times.tasks for value in worker.values]
        assert len(tasks) == K  # data tasks alone
        assert min(tasks) > 0.03  # all that made them late


async def test_crashes_that_are_injected(method: Scheme, images: np.ndarray) -> None:
    crash = Fault(kind="crash", worker=1, probability=0.5)
    async with running(method, schedule=Schedule(seed=3, faults=(crash,))) as (front, _):
        for start in range(0, 64, 2 * K):
            answered(await front.ask(images[start : start + 2 * K]))
        await until(lambda: front.workers[1].restarts >= 1)


@pytest.mark.parametrize("told", [False, True], ids=["cancelled", "told"])
async def test_a_caller_that_goes_away(told: bool, method: Scheme, images: np.ndarray) -> None:
    async with running(method, max_pending=5 * K) as (front, pool):
        for worker in range(WORKERS):
            pool.hang(worker)
        gone = asyncio.get_running_loop().create_future()
        query = asyncio.create_task(front.ask(images[: 5 * K], gone=gone))
        await until(lambda: len(pool.calls) == WORKERS)
        with pytest.raises(Overloaded):
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
        shown = [outcome for view in front.groups for outcome in view.outcomes.values()]
        assert shown == ["cancelled"] * 5 * K
        front.check_room(5 * K)
        for worker in range(WORKERS):
            pool.kill(worker)
        assert len(pool.calls) == WORKERS
        answered(await front.ask(images[:K]))
        assert value("codedinvnet_queries_total", {"outcome": "cancelled"}) == 5 * K


async def test_what_is_computed_of_a_caller_that_goes_away_decodes_others(
    mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    class Held(BundlePool):
        async def _work(self, worker: int, task: Task) -> Result:
            if worker == 1:
                await go_on.wait()
            return await super()._work(worker, task)

    go_on = asyncio.Event()
    async with running(method, pool=Held(method), group_timeout=PATIENCE) as (front, pool):
        pool.hang(0)
        slow = asyncio.create_task(front.ask(images[:1]))
        await until(lambda: len(pool.calls) == 1)
        gone = asyncio.create_task(front.ask(images[1:2]))
        await until(lambda: len(pool.calls) == 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        answered(await front.ask(images[2:K]))
        assert not slow.done()
        go_on.set()
        (answer,) = answered(await slow)
        assert_decoded(answer, decoded(mnist, images[:K], 0))


async def test_what_is_answered_is_not_cancelled(method: Scheme, images: np.ndarray) -> None:
    async with running(method, policy="uncoded") as (front, pool):
        pool.hang(0)
        gone = asyncio.get_running_loop().create_future()
        query = asyncio.create_task(front.ask(images[:3], gone=gone))
        await until(lambda: len(front.waiting) == 1)
        gone.set_result(None)
        found = await query
        assert [type(answer) for answer in found] == [QueryFailed, Answered, Answered]
        counts = front.metrics.queries.labels
        assert counts("direct")._value.get() == 2
        assert counts("cancelled")._value.get() == 1
        pool.kill(0)
        again = asyncio.get_running_loop().create_future()
        answered(await front.ask(images[:3], gone=again))
        again.set_result(None)  # long after
        await asyncio.sleep(0)
        assert counts("cancelled")._value.get() == 1


@pytest.mark.parametrize("at", ["decoder", "answer"])
async def test_one_that_goes_away_while_its_answer_is_made(
    at: str, method: Scheme, images: np.ndarray
) -> None:
    async with running(method, policy="uncoded") as (front, _):
        busy = threading.Event()
        queue(front).thread.submit(busy.wait)
        query = asyncio.create_task(front.ask(images[:1]))
        await until(lambda: bool(front.waiting) and not front.scheduler.queries)
        (number,) = front.waiting
        query.cancel()
        if at == "answer":  # before the call knows
            front.waiting.answer(number, {})
        await asyncio.gather(query, return_exceptions=True)
        assert not front.waiting
        busy.set()
        await until(lambda: not queue(front)._running)
        counts = front.metrics.queries.labels
        assert counts("cancelled")._value.get() == 1
        assert counts("direct")._value.get() == 0


async def test_the_page_shows_the_last_groups(method: Scheme, images: np.ndarray) -> None:
    async with running(method) as (front, pool):
        pool.hang(2)
        answered(await front.ask(images[:K]))
        (group,) = front.groups
        assert sorted(group.outcomes.values()) == ["decoded", "direct", "direct", "direct"]
        assert group.outcomes[list(group.members)[2]] == "decoded"
        pool.kill(2)
        await until(lambda: front.workers[2].restarts == 1)
        for _ in range(views.SHOWN_GROUPS):
            answered(await front.ask(images[: 2 * K]))
        assert len(list(front.groups)) == views.SHOWN_GROUPS
        front.update_gauges()


class HeadFails(MeanCode):
    """Its workers work, and its front end's share of the work does not."""

    broken = False

    def direct(self, output: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise RuntimeError("the head is broken")
        return super().direct(output)


@pytest.mark.parametrize("hung", [(), (1,)], ids=["direct", "decoded"])
async def test_a_front_end_that_cannot_compute_says_so(
    hung: tuple[int, ...], mnist: Bundle, images: np.ndarray
) -> None:
    code = HeadFails(mnist.model, K)
    method = replace(scheme_for(mnist, K), code=code)

    async with running(method) as (front, pool):
        code.broken = True
        for worker in hung:
            pool.hang(worker)
        found = await asyncio.wait_for(front.ask(images[:K]), 30)
        assert [type(f) for f in found] == [QueryFailed] * K
        assert "the head is broken" in str(found[0])
        code.broken = False
        for worker in hung:
            pool.kill(worker)
        answered(await front.ask(images[:K]))


def test_too_few_workers(method: Scheme) -> None:
    with pytest.raises(ValueError, match="too few"):
        BundleFront(method, BundlePool(method), Rules(K, POLICIES["coded"]))


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
    async with running(method, pool=pool, policy=policy, hang_timeout=1.0) as (front, _):
        answers = answered(await front.ask(images[:K]))
        assert max(answer.seconds for answer in answers) < 1.0
        await asyncio.sleep(1.2)
        assert [view.deaths for view in front.workers] == [0] * WORKERS
        assert front.metrics.task_failures.labels("2")._value.get() >= 1
    told = next(r for r in caplog.records if r.message == "the pool raised")
    reason = f"{type(error).__name__}: {error}"
    assert vars(told)["fields"] == {"pool": "Raising", "worker": 2, "reason": reason}
    assert told.exc_info is not None


@pytest.mark.parametrize("action", ["Send", "Answer", "Decode"])
async def test_an_action_that_cannot_be_carried_out_ends_its_queries(
    action: str, method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = True
    carry_out = FrontEnd._carry_out

    def carry_out_or_fail(front: BundleFront, what: Action) -> None:
        if fails and type(what).__name__ == action:
            raise MemoryError("no room")
        carry_out(front, what)

    monkeypatch.setattr(BundleFront, "_carry_out", carry_out_or_fail)

    async with running(method) as (front, pool):
        pool.hang(1)
        began = time.monotonic()
        found = await front.ask(images[:K])
        assert time.monotonic() - began < 10
        problems = [problem for problem in found if isinstance(problem, QueryFailed)]
        assert {str(problem) for problem in problems} == {"MemoryError: no room"}
        assert len(problems) == {"Send": K, "Answer": K - 1, "Decode": 1}[action]
        fails = False
        answered(await front.ask(images[:K]))
        assert [view.deaths for view in front.workers] == [0] * WORKERS


async def test_a_worker_that_could_not_be_replaced_at_once_is_replaced(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, fails = FrontEnd._replace, [True]

    def replace_or_fail(front: BundleFront, worker: int, reason: str) -> Any:
        if fails:
            fails.clear()
            raise MemoryError
        return replace(front, worker, reason)

    monkeypatch.setattr(BundleFront, "_replace", replace_or_fail)

    async with running(method) as (front, pool):
        pool.kill(0)
        await until(lambda: front.workers[0].restarts == 1)
        assert not fails
        answered(await front.ask(images[:K]))


async def test_a_timer_that_could_not_be_set_is_set_later(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(method, policy="uncoded", deadline=0.3) as (front, pool):
        pool.hang(0)
        loop = asyncio.get_running_loop()
        fails = [True]
        call_later = loop.call_later

        def call_or_fail(delay: float, call: Any, *rest: Any, **named: Any) -> Any:
            if fails and call == front._alarm._ring:
                fails.clear()
                raise MemoryError
            return call_later(delay, call, *rest, **named)

        monkeypatch.setattr(loop, "call_later", call_or_fail)
        (problem,) = await asyncio.wait_for(front.ask(images[:1]), 10)
        assert isinstance(problem, DeadlinePassed)
        assert not fails


async def test_draining_ends_though_a_query_is_forgotten(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "GRACE", 0.1)

    async with running(method, policy="uncoded", deadline=0.2) as (front, pool):
        pool.hang(0)
        with monkeypatch.context() as patch:
            patch.setattr(front.scheduler, "next_timer", lambda: None)
            query = asyncio.create_task(front.ask(images[:1]))
            await until(lambda: len(pool.calls) == 1)
            await asyncio.wait_for(front.drain(), 10)
        (problem,) = await query
        assert str(problem) == "the service stops"


async def test_answers_that_could_not_be_computed_together_end(
    method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("no room")

    async with running(method) as (front, _):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "compute_apart", fails)
            found = await asyncio.wait_for(front.ask(images[:K]), 10)
        reasons = {str(problem) for problem in found}
        assert reasons == {"decoding failed: MemoryError: no room"}
        answered(await front.ask(images[:K]))


class TestDown:
    """No worker is up, and none comes back."""

    async def test_queries_are_refused_until_one_is_back(
        self, method: Scheme, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.05,))

        pool = Stubborn(method)
        async with running(method, pool=pool, down_timeout=0.5) as (front, _):
            pool.problems = [WorkerDied("no node")] * 1000
            for worker in range(WORKERS - 1):
                pool.kill(worker)
            await asyncio.sleep(0.2)
            assert front.ready  # one is up
            pool.kill(WORKERS - 1)
            await until(lambda: not front.ready)
            with pytest.raises(Starting):
                await front.ask(images[:1])
            assert front.supervisor.is_live
            await until(lambda: not front.supervisor.is_live)
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
        self,
        method: Scheme,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
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
