"""The simulation against the service's real dispatcher, in virtual time.

`Dispatcher` runs as it is, on an event loop whose clock jumps to the next event instead of waiting,
over workers that sleep for a drawn time. Both draw arrivals and service times from the same
generators in the same order, so that without faults every single latency must be the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Code, Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, CodeRules, Parities
from codedinvnet.common.quantiles import percentile
from codedinvnet.serving.answers import Answered
from codedinvnet.serving.served import classified
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from codedinvnet.serving.workers.pool import OUTPUT, Death, Result, Task, WorkerPool
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.scenario import Scenario
from tests.serving.bundles import BundleFront
from tests.simulation.scenarios import scenario
from tests.virtual import VirtualLoop


class Nothing(Code):
    """A code that computes nothing."""

    def __init__(self, rules: CodeRules) -> None:
        self.rules = rules

    def encode(self, task: int, queries: Tensor) -> Tensor:
        return queries[:, 0]

    def direct(self, output: Tensor) -> Tensor:
        return torch.zeros(output.shape[0], 2)

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        answered = self.rules.recoverable(frozenset(outputs), size)
        return {member: torch.zeros(len(next(iter(outputs.values()))), 2) for member in answered}


class SleepingPool:
    """Workers that sleep for a drawn time, at a parity as long as costs, and answer nothing.

    Args:
        service: the drawn times.
        given: of what else a task takes, the constants.
    """

    def __init__(self, service: Iterator[float], given: Scenario) -> None:
        self.on_death: Death | None = None
        self.service, self.given = service, given

    async def start(self, size: int) -> None: ...

    async def call(self, worker: int, task: Task) -> Result:
        seconds, given, length = next(self.service), self.given, 1
        if task.number >= given.k and given.coding.coded:
            images = task.members
            if given.method == "small-backup":
                seconds, length = seconds * images / given.k, images
            else:
                seconds += images * given.encode.ms / 1000
        seconds += given.trip.ms / 1000
        await asyncio.sleep(seconds)
        outputs = {OUTPUT: np.zeros((1, length), np.float32)}
        answer = classified(torch.zeros(1, 2)) if task.number < given.k else {}
        return Result({**outputs, **answer}, seconds)

    async def replace(self, worker: int) -> None:
        await asyncio.sleep(self.given.restart.ms / 1000)

    async def stop(self) -> None: ...

    def pid(self, worker: int) -> int | None:
        return None


def serve(
    given: Scenario, monkeypatch: pytest.MonkeyPatch, faults: Schedule | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Serve a scenario's requests with the real front end: latencies, and decoded answers."""
    simulation = Simulation(given)  # for its draws alone
    pool: WorkerPool = SleepingPool(simulation._service, given)
    if faults is not None:
        pool = FaultyPool(pool, faults)
    batch = given.arrivals.batch
    images = np.zeros((batch, 1, 1, 1), np.uint8)
    latency, decoded = np.zeros(simulation.requests), np.zeros(simulation.requests)
    loop = VirtualLoop()
    clock = SimpleNamespace(monotonic=loop.time, perf_counter=loop.time)
    for module in ("serving.dispatch", "serving.calls", "serving.queries", "net.alarm"):
        monkeypatch.setattr(f"codedinvnet.{module}.time", clock)
    for module in ("faults", "supervisor"):
        monkeypatch.setattr(f"codedinvnet.serving.workers.{module}.time", clock)

    async def request(front: BundleFront, number: int) -> None:
        began = loop.time()
        answers = await front.ask(images)
        latency[number] = loop.time() - began
        for answer in answers:
            assert isinstance(answer, Answered)
            decoded[number] += answer.outcome != "direct"

    async def run() -> None:
        models = dict.fromkeys((SERVED, BACKUP), nn.Flatten())
        scheme = Scheme("nothing", Nothing(given.code or Parities(given.k)), models, (1, 1, 1))
        deadline = given.deadline_ms / 1000
        front = BundleFront(scheme, pool, given.rules, deadline=deadline)
        await front.start()
        requests = []
        for number, at in enumerate(simulation._arrivals):
            await asyncio.sleep(max(0.0, at - loop.time()))
            requests.append(loop.create_task(request(front, number)))
        await asyncio.gather(*requests)
        await front.stop()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:  # ends what still sleeps
        runner.run(run())
    return latency, decoded


@pytest.mark.parametrize(
    ("policy", "batch", "more"),
    [
        ("uncoded", 1, {}),
        ("replicate", 1, {}),
        ("hedge", 1, {}),
        ("coded", 1, {}),
        ("coded", 7, {}),
        ("coded", 3, {"r": 2}),
        ("coded", 3, {"bundle": "cifar10"}),
        ("coded", 3, {"method": "small-backup"}),
        ("coded+hedge", 1, {}),
    ],
)
def test_every_latency_is_the_front_ends(
    policy: str, batch: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scenario(
        policy=policy,
        encode=2,
        trip=3,
        **more,
        workers=6,
        k=4,
        qps=60,
        batch=batch,
        queries=300 * batch,
        service={"distribution": "lognormal", "ms": 40, "shape": 0.7},
    )
    records = Simulation(given).run()
    latency, decoded = serve(given, monkeypatch)
    np.testing.assert_allclose(latency, records.latency, atol=1e-5)
    assert (decoded == records.decoded).all()
    coded = policy.startswith("coded")
    assert coded == bool(decoded.any())  # there was something to decode


FAULTS: dict[str, dict[str, Any]] = {
    "held": {"kind": "hold", "probability": 0.3, "per_request": True, "delay": {"ms": 300}},
    "blocked": {
        "kind": "slow",
        "probability": 0.04,
        "delay": {"distribution": "exponential", "ms": 200},
    },
    "hung": {"kind": "hang", "probability": 0.01},
    "crashed": {"kind": "crash", "probability": 0.04},
}
BY_DAY = [("uncoded", "hung"), ("coded+hedge", "crashed")]


@pytest.mark.parametrize(
    ("policy", "name", "queries"),
    [
        *((*pair, 6000) for pair in BY_DAY),
        *(
            pytest.param(*pair, 12_000, marks=pytest.mark.nightly)
            for pair in product(("uncoded", "coded+hedge"), FAULTS)
        ),
    ],
)
def test_injected_faults_mean_the_same(
    policy: str, name: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service's own fault injection draws its own fates: the distributions must agree."""
    fault = FAULTS[name]
    given = scenario(
        policy=policy,
        workers=8,
        k=4,
        qps=60,
        batch=4,
        queries=queries,
        service={"distribution": "lognormal", "ms": 40, "shape": 0.3},
        hang_timeout_ms=300 if fault["kind"] == "hang" else None,
        restart=200,
        stragglers=[fault],
    )
    # A worker that dies again and again waits for its place here, and is back in the simulator.
    monkeypatch.setattr("codedinvnet.serving.workers.supervisor.RESTART_DELAYS", (0.0,))
    records = Simulation(given).run()
    latency, decoded = serve(given, monkeypatch, Schedule.model_validate({"faults": [fault]}))
    rare = 0.12 if queries == 12_000 else 0.17
    for share, tolerance in ((0.5, 0.03), (0.9, 0.1), (0.99, rare)):
        simulated, served = (percentile(v, share) for v in (records.latency, latency))
        assert simulated == pytest.approx(served, rel=tolerance)
    assert records.decoded.mean() == pytest.approx(decoded.mean(), rel=0.15, abs=0.01)
