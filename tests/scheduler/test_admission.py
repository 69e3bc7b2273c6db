"""What is taken can be answered in time, and the workers are never without work."""

from __future__ import annotations

import asyncio
import heapq
import random
import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.scheduler.admission import Admission
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.answers import Answered, NotNow
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.pool import Result, Task, run_task
from tests.serving.bundles import BundleFront, BundlePool


class Outcome(NamedTuple):
    answered: int
    late: int
    refused: int
    longest: float
    waits: list[int]


def simulate(
    workers: int, service: float, load: float, deadline: float, seconds: float, batch: int = 1
) -> Outcome:
    """Send `load` times what the workers can do, in random intervals."""
    admission, draw = Admission(workers, 10**6), random.Random(0)
    free, ends, waits = [0.0] * workers, list[tuple[float, float]](), []
    pending = answered = late = refused = 0
    longest = now = 0.0
    while now < seconds:
        now += draw.expovariate(load * workers / service / batch)
        while ends and ends[0][0] <= now:
            end, came = heapq.heappop(ends)
            pending -= 1
            admission.note(end, pending, 1)
            late += end - came > deadline
            answered += end - came <= deadline
            longest = max(longest, end - came)
        if not admission.takes(pending, batch, deadline):
            refused += batch
            waits.append(admission.refuse(pending, batch))
            continue
        for _ in range(batch):
            end = max(now, heapq.heappop(free)) + service * draw.uniform(0.5, 1.5)
            heapq.heappush(free, end)
            heapq.heappush(ends, (end, now))
        pending += batch
        admission.note(now, pending)
    return Outcome(answered, late, refused, longest, waits)


@pytest.mark.parametrize(
    ("service", "seconds", "load", "batch"),
    [
        (0.005, 10, 1.5, 1),
        (0.005, 10, 20, 8),
        (0.05, 60, 5, 8),
        (0.5, 200, 1.5, 8),
        (0.5, 200, 20, 1),
    ],
)
def test_overload(service: float, seconds: int, load: float, batch: int) -> None:
    found = simulate(10, service, load, deadline=5.0, seconds=seconds, batch=batch)
    assert found.answered >= 0.95 * seconds * 10 / service
    assert found.late < 0.001 * found.answered
    assert found.refused
    # Half a deadline's worth waits, and all that was refused in two seconds is to come again.
    wait = statistics.median(found.waits[len(found.waits) // 2 :])
    assert wait == pytest.approx(min(2.5 + 2.0 * (load - 1.0), 60.0), rel=0.2, abs=1.0)


def test_nothing_is_refused_below_capacity() -> None:
    found = simulate(10, 0.02, 0.8, deadline=5.0, seconds=100)
    assert (found.refused, found.late) == (0, 0)


@pytest.mark.parametrize(("workers", "service", "deadline"), [(1, 5.0, 30.0), (6, 10.0, 60.0)])
@pytest.mark.parametrize("load", [3, 5])
def test_few_slow_answers_tell_how_many_can_wait(
    workers: int, service: float, deadline: float, load: float
) -> None:
    seconds = 3000.0
    found = simulate(workers, service, load, deadline, seconds)
    assert found.answered >= 0.95 * seconds * workers / service
    assert found.late < 0.001 * found.answered


SLEEPERS, SLEEP = 6, 0.04


class Sleeper(BundlePool):
    """Workers that take SLEEP seconds for a query, and no processor."""

    outputs: Mapping[str, np.ndarray] = {}

    async def _work(self, worker: int, task: Task) -> Result:
        await asyncio.sleep(SLEEP)
        return Result(self.outputs, SLEEP)


class Asked:
    """A service of sleeping workers, and how its queries ended."""

    def __init__(self, bundle: Bundle, scheme: Scheme) -> None:
        self.image = np.zeros((1, *bundle.info.input.shape), np.uint8)
        pool = Sleeper(scheme)
        pool.outputs = run_task(pool.computer, 0, {IMAGES: self.image}).outputs
        rules = Rules(SLEEPERS, POLICIES["uncoded"], hang_timeout=60.0, max_pending=10_000)
        self.front = BundleFront(scheme, pool, rules, deadline=2.0)
        self.answered = self.late = self.refused = 0
        self.waits: set[int] = set()

    async def ask(self) -> None:
        try:
            (answer,) = await self.front.ask(self.image)
        except NotNow as refusal:
            self.waits.add(refusal.seconds)
            self.refused += 1
            return
        self.answered += isinstance(answer, Answered)
        self.late += not isinstance(answer, Answered)


async def test_five_times_capacity() -> None:
    """Five times what can be done leaves as much done as before, and nothing too late.

    What the machine's other processes do in a bad second is not the rules': three trials.
    """
    bundle = load_bundle("mnist")
    for _ in range(3):
        full, flooded = await flood(bundle)
        found = f"{full.answered} answers at capacity, {flooded.answered} at five times"
        if flooded.answered >= 0.95 * full.answered and flooded.late == 0:
            break
    else:
        pytest.fail(f"{found}, {flooded.late} of them late")
    assert flooded.refused > 2 * full.answered
    assert flooded.waits >= {2, 4, 8}  # the more are to come back, the later


async def flood(bundle: Bundle) -> tuple[Asked, Asked]:
    """Ask two services side by side, as much as they can do and five times that.

    What else the machine does costs both the same.
    """
    scheme = scheme_for(bundle, 4)
    full, flooded = Asked(bundle, scheme), Asked(bundle, scheme)
    await asyncio.gather(full.front.start(), flooded.front.start())

    async def client() -> None:
        while time.monotonic() < end:
            await full.ask()

    try:
        began = time.monotonic()
        end = began + 3
        clients = [asyncio.create_task(client()) for _ in range(60)]
        asked: list[asyncio.Task[None]] = []
        while (now := time.monotonic()) < end:
            due = round(5 * SLEEPERS / SLEEP * (now - began))  # whatever the last sleep took
            asked += [asyncio.create_task(flooded.ask()) for _ in range(due - len(asked))]
            await asyncio.sleep(0.005)
        counted = full.answered, flooded.answered
        await asyncio.gather(*clients, *asked)
        full.answered, flooded.answered = counted
        return full, flooded
    finally:
        await asyncio.gather(full.front.stop(), flooded.front.stop())
