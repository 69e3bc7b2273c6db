"""Decoding: jobs together, outputs that are no good, and groups that check it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.common.confidence import confidences
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.faults import Fault
from codedinvnet.models.base import Scores, Signature, TensorSpec
from codedinvnet.models.bundle import Bundle
from codedinvnet.net.logs import logger
from codedinvnet.serving import decoding
from codedinvnet.serving.answers import QueryFailed
from codedinvnet.serving.served import PROBABILITIES, Classifier, OwnModel
from codedinvnet.serving.workers.faults import Schedule
from codedinvnet.serving.workers.pool import Result, Task
from tests.observing import until
from tests.serving.bundles import BundlePool, output, probabilities, with_output
from tests.serving.front import K, answered, direct, running

ScoreKind = Literal["logits", "probabilities"]
MNIST = Classifier("mnist", (1, 28, 28), tuple("0123456789"))


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_a_served_confidence_is_the_calibrated_one(kind: ScoreKind) -> None:
    """Decoded probabilities sum to 1, but may be negative, or above 1."""
    random = np.random.default_rng(0).normal(0.1, 0.4, (50, 10)).astype(np.float32)
    decoded = random / random.sum(1, keepdims=True)
    assert decoded.min() < 0
    assert decoded.max() > 1
    calibrated = confidences(decoded, kind)
    tensors = TensorSpec("x", "FP32", (3,)), TensorSpec("y", "FP32", (10,))
    served = OwnModel("m", Signature(tensors[:1], tensors[1:], scores=Scores("y", kind)))
    found = [answer.confidence for answer in decoding.answers(served, torch.from_numpy(decoded))]
    assert found == pytest.approx(calibrated)
    assert max(found) <= 1


@pytest.mark.parametrize("wrong", ["shape", "nan", "answer"])
async def test_an_output_that_is_no_good_is_lost_alone(
    wrong: str, mnist: Bundle, method: Scheme, images: np.ndarray
) -> None:
    class Foreign(BundlePool):
        async def _work(self, worker: int, task: Task) -> Result:
            result = await super()._work(worker, task)
            if worker != 0:
                return result
            if wrong == "answer":  # the output is finite, and too large for the head
                nan = np.full((1, len(MNIST.classes)), np.nan, np.float32)
                return result._replace(outputs={**result.outputs, PROBABILITIES: nan})
            bad = output(result)[:1] if wrong == "shape" else np.full_like(output(result), np.nan)
            return with_output(result, bad)

    async with running(method, pool=Foreign(method)) as (front, pool):
        for start in range(0, 24, K):
            batch = images[start : start + K]
            for row, answer in enumerate(answered(await front.ask(batch))):
                assert np.isfinite(probabilities(answer)).all()
                if answer.outcome == "direct":
                    np.testing.assert_allclose(
                        probabilities(answer), direct(mnist, batch)[row], atol=1e-5
                    )
        assert [worker for worker, _ in pool.calls].count(0) > 1


class Absurd(BundlePool):
    """One worker's outputs are finite, and nothing can be decoded of them."""

    def __init__(self, method: Scheme, absurd: int = 0) -> None:
        super().__init__(method)
        self.absurd = absurd

    async def _work(self, worker: int, task: Task) -> Result:
        result = await super()._work(worker, task)
        if worker != self.absurd:
            return result
        value = 3e38 if worker == K else -3e38  # the parity's is added, the others' are subtracted
        return with_output(result, np.full_like(output(result), value))


async def test_a_late_query_that_cannot_be_decoded_waits_for_its_own_answer(
    method: Scheme, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger.name):
        async with running(method, pool=Absurd(method)) as (front, pool):
            pool.hang(1)
            asked = asyncio.create_task(front.ask(images[:K], name="seven"))
            await until(lambda: "decoding failed" in caplog.text)
            assert not asked.done()
            pool.kill(1)
            for answer in answered(await asked):
                assert answer.outcome == "direct"
                assert np.isfinite(probabilities(answer)).all()
    (told,) = {
        (fields["id"], fields["reason"])
        for r in caplog.records
        if r.message == "decoding failed" and (fields := vars(r)["fields"])
    }
    assert told == ("seven", "the result is not finite")


async def test_a_parity_that_is_no_good_leaves_a_late_query_its_own_answer(
    method: Scheme, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Fault(kind="slow", worker=1, delay=Distribution(ms=1000))
    pool = Absurd(method, absurd=K)
    async with running(method, pool=pool, schedule=Schedule(faults=(slow,))) as (front, _):
        answers = answered(await front.ask(images[:K]))
        assert [answer.outcome for answer in answers] == ["direct"] * K
    assert "decoding failed" in caplog.text


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

    async with running(method, pool=Foreign(method)) as (front, pool):
        pool.hang(0)
        found = answered(await front.ask(images[:K]))
        assert [answer.outcome for answer in found] == ["decoded", *["direct"] * (K - 1)]
        tasks = front.metrics.registry.get_sample_value
        assert tasks("codedinvnet_tasks_total", {"task": "parity"}) == 2
    assert foreign


async def test_a_front_end_that_cannot_decode_says_so(
    mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = scheme_for(mnist, K, "nercc")  # every answer is decoded

    def fails(*_: Any) -> None:
        raise RuntimeError("the decoder is broken")

    async with running(method, workers=2 * K) as (front, _):
        with monkeypatch.context() as broken:
            broken.setattr(type(method.code), "decode", fails)
            found = await asyncio.wait_for(front.ask(images[:K]), 30)
        assert [type(f) for f in found] == [QueryFailed] * K
        assert "decoding failed: RuntimeError: the decoder is broken" in str(found[0])
        answered(await front.ask(images[:K]))
