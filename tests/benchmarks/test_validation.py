from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.validation import arms_of, compare, name_of, run, scenarios_of, table, tally
from benchmarks.validation import with_other_times as lent
from codedinvnet.codes.mosaic import mosaic_rules
from codedinvnet.codes.rules import Parities
from codedinvnet.errors import UserError
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import counted
from tests.evaluation.canned import latency_row
from tests.simulation.scenarios import scenario

TIMES = np.random.default_rng(0).exponential(20, 1000)
PARETO = {"kind": "slow", "probability": 0.01, "delay": {"distribution": "pareto", "ms": 50}}


def row(policy: str = "coded", times: np.ndarray = TIMES, **changes: Any) -> dict[str, Any]:
    keys = ("batch", "load", "stragglers", "run", "error")
    made = latency_row(policy, times, **{k: changes.pop(k) for k in keys if k in changes})
    rules = {"deadline_ms": 5000.0, "group_timeout_ms": 20.0, "hang_timeout_ms": 3000.0}
    faults = {"policy": policy, "qps": 180.0, "stragglers": [PARETO], "seed": 7}
    return {**made, "method": "coded-invnet", "r": 1, **rules, **faults, **changes}


def test_a_run_is_repeated_with_its_settings_and_its_arrivals() -> None:
    arm = [row(requests=40, batch=10, service=22.0, run=n, seed=n) for n in (1, 2)]
    base = scenario(queries=100, seed=3, warmup=0.5, trip=0.5)
    found = scenarios_of(arm, base)
    assert [[s.seed for s in own] for own in found] == [[3, 5, 7], [4, 6, 8]]
    for number, own in zip((1, 2), found, strict=True):
        gaps = random.Random(number)
        wanted = np.cumsum([gaps.expovariate(180 / 10) for _ in range(40)])
        for one in own:
            assert (one.queries, one.counted) == (400, 40)
            assert (one.service.ms, one.trip.ms, one.stragglers[0].probability) == (22, 0.5, 0.01)
            np.testing.assert_allclose(one.arrivals.times(np.random.default_rng(0), 40), wanted)
            assert one.code == Parities(10)
    ((apart, *_),) = scenarios_of([row(apart=True, bundle="cifar10", k=10)], base)
    assert apart.code == mosaic_rules(10)


def test_times_come_from_other_runs() -> None:
    rows = [
        row("coded", run=1, service=1.0, encode=0.1),
        row("coded", run=2, service=2.0, encode=0.2),
        row("uncoded", service=3.0),
        row("hedge", service=4.0, load=0.2, qps=90.0),
    ]
    found = [[(r.get("service"), r.get("encode")) for r in arm] for arm in lent(arms_of(rows))]
    assert found == [
        [(3.0, 0.2), (3.0, 0.1)],  # another policy's at this load; encoding only from another run
        [(1.0, None)],
        [(1.0, None)],
    ]
    assert lent(arms_of(rows[:1])) == [[rows[0]]]  # there is no other


def test_rows_count_as_in_the_tables_of_the_benchmark() -> None:
    rows = [row(run=1), row(run=2), row("uncoded", error="RuntimeError: no"), row(run=2)]
    (arm,) = arms_of(rows)
    assert len(arm) == 2
    assert "run" not in name_of(arm)
    with pytest.raises(UserError, match="no measured run"):
        arms_of([row(error="RuntimeError: no")])


def report_row(name: str, measured: float | None, simulated: float | None, place: str = "") -> Any:
    cell = {"measured_ms": measured, "simulated_ms": simulated}
    return {"name": name, "runs": 1, "place": place, "percentiles": {"p99": cell}}


def test_errors_and_the_order_of_arms_are_counted() -> None:
    arms = [
        report_row("a", 100.0, 110.0),
        report_row("b", 200.0, 190.0),
        report_row("c", 110.0, 300.0),  # too near to a for the order to count, and behind b
        report_row("d", 50.0, 400.0, place="elsewhere"),
        report_row("lost", None, None),
        report_row("found", None, 500.0),
    ]
    (found,) = tally(arms).values()
    assert (found["compared"], found["near"]) == (5, 0.4)
    # a, b, c against both that never end; a and b; b and c.
    assert (found["pairs"], found["in_order"]) == (8, 0.875)
    assert found["median_error"] == pytest.approx(300 / 110 - 1, abs=1e-4)
    assert table(arms).splitlines()[-1].split()[:4] == ["p99", "5", "8", "40.0%"]


def test_a_wrong_policys_simulation_is_judged_as_the_right_one_is() -> None:
    arms = [report_row(name, ms, ms) for name, ms in (("a", 100.0), ("b", 200.0), ("c", 400.0))]
    (found,) = tally([*arms, report_row("alone", 100.0, 100.0, place="elsewhere")]).values()
    assert (found["compared"], found["near"], found["median_error"]) == (4, 1.0, 0.0)
    assert (found["pairs"], found["in_order"]) == (3, 1.0)
    # The errors are 1, 3, 0.5, 1, 0.75 and 0.5. Of three wrong pairs each one, one and none are in
    # order: (b, c) for (a, b), (a, b) for (b, c).
    assert found["wrong"] == {"near": 0.0, "median_error": 0.875, "in_order": 0.2222}


def test_a_simulated_run_meets_itself_and_no_slower_one(tmp_path: Path) -> None:
    """The requests of another seed stand in for measured ones."""
    given = scenario(workers=11, k=10, qps=180, service=24, queries=12_000, stragglers=[PARETO])
    given = given.updated(policy="coded", gaps_seed=7, warmup=0.0)
    truth = counted(Simulation(given.updated(seed=7)).run(), given)
    lost = np.append(truth[:-200], np.full(200, np.inf))
    measured, base = tmp_path / "rows.jsonl", tmp_path / "base.json"
    base.write_text(
        json.dumps(scenario(queries=12_000).model_dump(mode="json", exclude_unset=True))
    )
    for times, service, near in ((truth, 24, 1), (truth, 30, 0)):
        rows = [row(times=times, batch=1, requests=12_000, service=service)]
        measured.write_text("".join(json.dumps(one) + "\n" for one in rows))
        found = run(scenario=base, measured=measured, out=tmp_path / "out.json", queries=None)
        assert found["percentiles"]["p50"]["near"] == near
        assert json.loads((tmp_path / "out.json").read_text())["arms"] == found["arms"]
    assert compare([row(times=lost)], lost)["p99"] == {"measured_ms": None, "simulated_ms": None}
