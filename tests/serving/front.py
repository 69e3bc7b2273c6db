"""A front end over workers that are threads of this process, for the tests."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import Parities
from codedinvnet.models.bundle import Bundle
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.answers import Answered, QueryFailed
from codedinvnet.serving.decoding import Decoder
from codedinvnet.serving.gate import AnswerGate
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from codedinvnet.serving.workers.pool import Result, Task, run_task
from tests.observing import until
from tests.serving.bundles import BundleFront, BundlePool, probabilities

K, WORKERS = 4, 6


PATIENCE = 60.0
"""A deadline that is never in the way."""


@asynccontextmanager
async def running(
    method: Scheme,
    *,
    pool: BundlePool | None = None,
    schedule: Schedule | None = None,
    policy: str = "coded",
    gate: AnswerGate | None = None,
    deadline: float = PATIENCE,
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
        gate=gate,
        deadline=deadline,
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


def queue(front: BundleFront) -> Decoder:
    assert front.decoder is not None
    return front.decoder


def leftovers(front: BundleFront) -> dict[str, Any]:
    scheduler = front.scheduler
    kept = {
        "waiting": dict(front.queries),
        "inputs": front.calls.payloads,
        "outputs": front.calls.outputs,
        "jobs": queue(front)._jobs,
        "queries": scheduler.queries,
        "attempts": scheduler.attempts,
        "tasks": scheduler.waiting,
        "groups": scheduler.flying.groups,
        "computed_by": scheduler.flying.computed_by,
    }
    return {name: things for name, things in kept.items() if things}


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
    return bundle.decode(bundle.encode(group[None]), latents)[0].numpy()


def assert_decoded(answer: Answered, expected: np.ndarray, outcome: str = "decoded") -> None:
    assert answer.outcome == outcome
    assert int(probabilities(answer).argmax()) == int(expected.argmax())
    np.testing.assert_allclose(probabilities(answer), expected, atol=1e-4)


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
    code.rules = Parities(K, fixed_size=True)
    return replace(scheme, code=code)
