from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sweep import Sweep
from codedinvnet.codes.named_policies import served_as
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Fault
from codedinvnet.common.files import read_json
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.workers.faults import Schedule
from codedinvnet.simulation.arrivals import Arrivals
from codedinvnet.simulation.scenario import parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from tests.simulation.scenarios import scenario

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "bench").glob("simulate-*.json"))


def test_the_shipped_files_are_valid() -> None:
    assert len(FILES) >= 4
    for path in FILES:
        raw = read_json(path)
        if "base" not in raw:
            parse_scenario(raw, str(path))
        else:
            sweep = Sweep.model_validate(raw)
            varied = (sweep.loads, sweep.policies, sweep.stragglers, sweep.batches)
            places = math.prod(map(len, varied)) * max(1, len(sweep.variants))
            assert len(list(sweep.scenarios())) == places
            coded = any(served_as(policy).rules.coded for policy in sweep.policies)
            assert ("small-backup" in sweep.policies) == coded


def test_the_rules_are_those_of_serve() -> None:
    """Same options, same rules."""
    for pending, meant in ((None, 7400), (500, 500)):
        options = ServeOptions(
            source="mnist", k=4, workers=37, policy="coded+hedge", max_pending=pending
        )
        dispatcher = open_app(options).dispatcher
        same = scenario(k=4, workers=37, policy="coded+hedge", max_pending=pending)
        assert same.rules == dispatcher.rules
        assert same.rules.max_pending == meant


@pytest.mark.parametrize("deadline", [300.0, 2000.0, 4000.0, 5000.0, 60_000.0])
def test_the_hang_timeout_is_serves(deadline: float) -> None:
    options = ServeOptions(source="mnist", k=4, deadline_ms=deadline)
    assert scenario(deadline_ms=deadline).rules.hang_timeout == options.hang_timeout
    given = options.model_copy(update={"hang_timeout_ms": 250.0})
    same = scenario(deadline_ms=deadline, hang_timeout_ms=250)
    assert same.rules.hang_timeout == given.hang_timeout == 0.25


# Arrivals


@pytest.mark.parametrize("kind", ["poisson", "uniform", "bursts", "uneven"])
def test_arrivals_have_the_rate_that_was_asked_for(kind: Any) -> None:
    arrivals = Arrivals(kind=kind, qps=400, batch=4, burst_ms=100, calm_ms=300)
    times = arrivals.times(np.random.default_rng(0), 100_000)
    assert times.shape == (100_000,)
    assert (np.diff(times) >= 0).all()
    assert 100_000 / times[-1] == pytest.approx(100, rel=0.05 if kind == "uneven" else 0.03)


def test_arrivals_in_steps_change_their_rate_in_mid_run() -> None:
    arrivals = Arrivals(kind="steps", qps=1000, steps=(0.5, 2.0))
    gaps = np.diff(arrivals.times(np.random.default_rng(0), 100_000))
    assert 1 / gaps[:49_000].mean() == pytest.approx(500, rel=0.03)
    assert 1 / gaps[51_000:].mean() == pytest.approx(2000, rel=0.03)


# Stragglers


def test_a_faults_file_of_the_service_is_understood(tmp_path: Path) -> None:
    faults = (
        Fault(kind="slow", worker=3, delay=Distribution(ms=30)),
        Fault(kind="hold", probability=0.1, delay=Distribution(ms=100)),
        Fault(kind="crash", worker=5, from_s=10, until_s=10.5),
    )
    path = tmp_path / "faults.json"
    path.write_text(Schedule(seed=1, faults=faults).model_dump_json())
    found = stragglers(str(path), 10, 1)
    assert [s.kind for s in found] == ["slow", "hold", "crash"]
    assert found[0].worker == 3
    assert found[1].delay is not None
    assert found[1].delay.mean_ms == 100


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault(kind="slow", delay=Distribution(ms=30), from_task=10), "from_task"),
        (Fault(kind="hang", until_task=10), "until_task"),
        (Fault(kind="slow", delay=Distribution(ms=30), each_image=True), "each_image"),
        (Fault(kind="slow", delay=Distribution(ms=30), spread=True), "spread"),
        (Fault(kind="corrupt", scale=2.0), "corrupt"),
    ],
)
def test_faults_that_are_not_simulated(fault: Fault, told: str, tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    path.write_text(Schedule(faults=(fault,)).model_dump_json())
    with pytest.raises(UserError, match=told):
        stragglers(str(path), 10, 1)


# Bad input

HELD = {"kind": "hold", "delay": 9, "per_request": True}
BURST = {"kind": "burst", "factor": 2, "delay": 1, "every_s": 1, "workers": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "prayer"}, "policy: not one of uncoded, replicate"),
        ({"method": "nercc"}, "nercc goes with the policies that have a code"),
        ({"method": "small-backup", "policy": "coded", "workers": 12, "r": 2}, "has r = 1"),
        ({"method": "magic"}, "method: 'magic' is not one of coded-invnet"),
        ({"backup": True}, "backup"),
        ({"method": "nercc", "policy": "coded+hedge", "workers": 12}, "with policy coded only"),
        (
            {"method": "approxifer", "policy": "coded", "workers": 12, "stragglers": [HELD]},
            "per_request.; approxifer has none",
        ),
        ({"policy": "coded", "workers": 10}, "10 workers are too few: .* needs 11"),
        ({"policy": "replicate"}, "1 workers are too few: policy replicate needs 2"),
        ({"policy": "coded", "k": 1, "workers": 9}, "k of at least 2"),
        ({"qps": 0.0}, "arrivals.qps: input should be greater than 0"),
        ({"service": 0}, "service must take some time"),
        ({"service": {"distribution": "pareto", "ms": 1, "shape": 1}}, "finite one in the mean"),
        ({"workesr": 3}, "unknown key 'workesr': did you mean 'workers'"),
        ({"stragglers": [{"kind": "slow"}]}, "'slow' needs delay"),
        ({"stragglers": [{"kind": "hang", "delay": 1}]}, "'hang' has no delay"),
        ({"stragglers": [{"kind": "burst", "factor": 2}]}, "needs delay, every_s, workers"),
        ({"stragglers": [{**HELD, "kind": "factor", "factor": 2}]}, "'factor'"),
        ({"stragglers": [{**BURST, "worker": 0}]}, "a burst draws its workers"),
        ({"stragglers": [{**BURST, "probability": 0.5}]}, "a burst draws its workers"),
        ({"stragglers": [{"kind": "hang", "from_s": 3, "until_s": 3}]}, "3 is not after from_s 3"),
        ({"batch": 257}, "requests of 257 images could never be taken: 256"),
        ({"batch": 8, "max_pending": 7}, "of 8 images could never be taken: 7"),
        ({"stragglers": [{"kind": "hang", "worker": 1}]}, "names more than the 1 workers"),
        ({"slots": None}, "found only of servers with cores"),
        ({"cores": 1, "stragglers": [{"kind": "hang"}]}, "neither crash nor hang"),
        ({"cores": 2, "worker_batch": 4}, "worker_batch goes with one slot"),
        ({"long_share": 0.1, "policy": "coded", "k": 4, "workers": 6}, "have no code"),
    ],
)
def test_scenarios_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        scenario(**changes)
