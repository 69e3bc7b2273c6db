"""The check of the simulator: a wrong simulation fails it."""

from __future__ import annotations

from typing import Any

import pytest

from codedinvnet.simulation.agreement import check
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.measured import MeasuredArm, MeasuredRun, with_times_of_others


def arm(setting: str, policy: str, measured: float | None, simulated: float | None) -> Any:
    cell = {"measured_ms": measured, "simulated_ms": simulated}
    return {"name": f"{setting}: {policy}", "percentiles": {"p99": cell}}


def test_a_right_simulation_passes_where_a_wrong_policys_does_not() -> None:
    arms = [
        arm("calm", "a", 100.0, 90.0),
        arm("calm", "b", 200.0, 210.0),
        arm("calm", "c", 400.0, 300.0),
        arm("busy", "a", 1000.0, 1000.0),
        arm("busy", "b", 1100.0, None),
    ]
    found = check(arms)
    assert found is not None
    own, wrong = found
    assert (own.cells, own.near, own.pairs, own.ordered) == (4, 3, 3, 3)
    assert own.median_error == pytest.approx(0.075)
    assert (wrong.cells, wrong.near) == (7, 1)  # "b" of "busy" with the simulation of "a"
    assert wrong.median_error > own.median_error
    assert (wrong.pairs, wrong.ordered) == (6, 2)


def test_there_is_nothing_to_check_where_nothing_ends() -> None:
    assert check([]) is None
    assert check([arm("calm", "a", None, None)]) is None


def run(policy: str, ms: float, **more: Any) -> MeasuredRun:
    service = {
        "distribution": "empirical",
        "values_ms": [ms, 2 * ms],
        "shares": [0.0, 1.0],
    }
    raw = {
        "schema_version": 1,
        "kind": "latency",
        "name": policy,
        "policy": policy,
        "workers": 4,
        "k": 2,
        "qps": 10.0,
        "requests": 100,
        "p50_ms": 10.0,
        "p99_ms": 20.0,
        "service": service,
        **more,
    }
    return MeasuredRun.model_validate(raw)


def test_times_are_those_of_other_runs() -> None:
    arms = [
        MeasuredArm((run("uncoded", 10.0), run("uncoded", 12.0))),
        MeasuredArm((run("hedge", 20.0),)),
        MeasuredArm((run("replicate", 40.0),)),
        MeasuredArm((run("coded", 90.0, batch=5),)),
    ]
    found = [one.runs[0].service for one in with_times_of_others(arms)]
    told = [None if service is None else service.values_ms for service in found]
    assert told == [(30.0, 60.0), (20.6667, 41.3333), (14.0, 28.0), (20.5, 41.0)]
    (alone,) = with_times_of_others(arms[:1])
    assert alone == arms[0]
    odd = MeasuredArm((run("hedge", 1.0, service=Distribution(ms=5).model_dump()),))
    (first, _) = with_times_of_others([arms[0], odd])
    assert first.runs[0].service == Distribution(ms=5)
