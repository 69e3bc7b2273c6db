from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.codes.mosaic import mosaic_rules
from codedinvnet.codes.rules import Parities
from codedinvnet.errors import UserError
from codedinvnet.simulation.figures import simulate_requests
from codedinvnet.simulation.measured import (
    MeasuredArm,
    MeasuredRun,
    arms_of,
    compare,
    place_of,
    read_runs,
    scenario_of,
    scenarios_of,
    table,
    tally,
    with_others_times,
)
from tests.evaluation.canned import latency_row
from tests.simulation.scenarios import scenario

TIMES = np.random.default_rng(0).exponential(20, (3, 1000))
ROW: dict[str, Any] = {
    "schema_version": 1,
    "kind": "latency",
    "name": "pareto/coded at 40 %",
    "commit": "abc",
    "policy": "coded",
    "workers": 11,
    "k": 10,
    "qps": 180.0,
    "batch": 10,
    "requests": 1000,
    "stragglers": [
        {"kind": "slow", "probability": 0.01, "delay": {"distribution": "pareto", "ms": 50}}
    ],
    "service": {"distribution": "empirical", "values_ms": [20, 22, 24]},
    "latencies_ms": TIMES[0].tolist(),
}


def run_of(**changes: Any) -> MeasuredRun:
    return MeasuredRun.model_validate({**ROW, **changes})


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_scenarios(tmp_path: Path) -> None:
    failed = {key: ROW[key] for key in ("schema_version", "kind", "name")} | {"error": "no luck"}
    mosaic = {**ROW, "apart": True, "bundle": "cifar10"}
    path = write(tmp_path / "rows.jsonl", {"schema_version": 1}, failed, ROW, mosaic)
    run, apart = read_runs(path)
    base = scenario(queries=500, trip=0.5, front_end=2)
    found = scenario_of(run, base.updated(bundle="cifar10"))
    assert found.code == Parities(10)  # rows of before do not say it: there was no mosaic
    assert scenario_of(apart, base).code == mosaic_rules(10)
    assert (found.policy, found.workers, found.k) == ("coded", 11, 10)
    assert (found.arrivals.qps, found.arrivals.batch, found.queries) == (180, 10, 10_000)
    assert found.service.values_ms == (20, 22, 24)
    assert found.stragglers[0].probability == 0.01
    assert (found.trip.ms, found.front_end.ms) == (0.5, 2)  # the run does not say
    assert scenario_of(run, base.updated(queries=100_000)).queries == 1_000_000
    assert scenario_of(run_of(method="small-backup"), base).method == "small-backup"


def test_known_arrivals_are_repeated_with_other_draws() -> None:
    runs = [run_of(requests=40, seed=seed) for seed in (7, 8)]
    arm = MeasuredArm(tuple(runs))
    found = scenarios_of(arm, scenario(queries=100, seed=3, warmup=0.5))
    assert [[s.seed for s in own] for own in found] == [[3, 5, 7], [4, 6, 8]]
    for run, own in zip(runs, found, strict=True):
        assert {(s.queries, s.requests, s.counted) for s in own} == {(400, 40, 40)}
        gaps = random.Random(run.seed)
        wanted = np.cumsum([gaps.expovariate(180 / 10) for _ in range(40)])
        for one in own:
            times = one.arrivals.times(np.random.default_rng(one.seed), 40)
            np.testing.assert_allclose(times, wanted)
    assert arm.seeded
    unknown = MeasuredArm((runs[0], run_of()))
    assert not unknown.seeded
    assert [len(own) for own in scenarios_of(unknown, scenario(queries=100))] == [3, 1]


def test_runs_of_an_arm_are_one() -> None:
    runs = [
        run_of(latencies_ms=own.tolist(), key=str(n), name=f"{ROW['name']}, run {n}")
        for n, own in enumerate(TIMES, start=1)
    ]
    other = runs[1].model_copy(update={"key": "4", "settings": {"wait_ms": 1}})
    newer = runs[2].model_copy(update={"service": None})
    arm, alone = arms_of([*runs, other, newer])
    assert [len(arm.runs), len(alone.runs)] == [3, 1]
    assert arm.runs[2] == newer  # the newest of its key
    assert (arm.name, alone.name) == (ROW["name"], f"{ROW['name']}, run 2")
    assert place_of(arm) == place_of(alone)
    assert place_of(arm) != place_of(MeasuredArm((run_of(qps=200),)))
    cells = compare(arm, list(TIMES))
    assert set(cells) == {"p50", "p99"}  # three requests are beyond p99.9
    for cell in cells.values():
        assert cell["measured_ms"] == pytest.approx(cell["simulated_ms"], rel=0.006)


def test_a_simulated_run_meets_itself_and_no_slower_one() -> None:
    """What a run of another seed came to stands in for a measured one."""
    slow = {"kind": "slow", "probability": 0.02, "delay": {"distribution": "exponential", "ms": 50}}
    raw = {key: ROW[key] for key in ("policy", "workers", "k", "qps")}
    given = scenario(**raw, service=24, queries=30_000, stragglers=[slow])
    truth, _ = simulate_requests(given.updated(seed=7))
    row = {"batch": 1, "requests": len(truth), "service": 24, "stragglers": [slow]}
    run = run_of(**row, latencies_ms=truth.tolist())
    slower = run.model_copy(update={"service": given.service.model_copy(update={"ms": 30.0})})
    arms = []
    for name, one in (("same", run), ("slower", slower)):
        simulated = simulate_requests(scenario_of(one, given))[0]
        cells = compare(MeasuredArm((run,)), [simulated])
        arms.append({"name": name, "runs": 1, "place": name, "percentiles": cells})
    same, late = (tally([arm]) for arm in arms)
    assert set(same) == {"p50", "p99", "p999"}
    assert all(found["near"] == 1 for found in same.values())
    assert late["p50"]["near"] == 0
    assert late["p50"]["median_error"] > 0.2


def arm(name: str, measured: float | None, simulated: float | None, place: str = "") -> Any:
    cell = {"measured_ms": measured, "simulated_ms": simulated}
    return {"name": name, "runs": 1, "place": place, "percentiles": {"p99": cell}}


def test_errors_and_the_order_of_arms_are_counted() -> None:
    arms = [
        arm("a", 100.0, 110.0),
        arm("b", 200.0, 190.0),
        arm("c", 110.0, 300.0),  # too near to a for the order to count, and behind b
        arm("d", 50.0, 400.0, place="elsewhere"),
        arm("lost", None, None),
        arm("found", None, 500.0),
    ]
    (found,) = tally(arms).values()
    assert (found["compared"], found["near"]) == (5, 0.4)
    # a, b, c against both that never end; a and b; b and c.
    assert (found["pairs"], found["in_order"]) == (8, 0.875)
    assert found["median_error"] == pytest.approx(300 / 110 - 1, abs=1e-4)
    words = table(arms)[-1].split()
    assert words[:5] == ["p99", "5", "8", "40.0%", words[4]]


def test_a_wrong_policys_simulation_is_judged_as_the_right_one_is() -> None:
    arms = [arm("a", 100.0, 100.0), arm("b", 200.0, 200.0), arm("c", 400.0, 400.0)]
    alone = arm("alone", 100.0, 100.0, place="elsewhere")
    (found,) = tally([*arms, alone]).values()
    assert (found["compared"], found["near"], found["median_error"]) == (4, 1.0, 0.0)
    assert (found["pairs"], found["in_order"]) == (3, 1.0)
    # The errors are 1, 3, 0.5, 1, 0.75 and 0.5. Of three wrong pairs each one, one and none are in
    # order: (b, c) for (a, b), (a, b) for (b, c).
    assert found["wrong"] == {"near": 0.0, "median_error": 0.875, "in_order": 0.2222}
    (found,) = tally([alone]).values()
    assert found["wrong"] == {"near": None, "median_error": None, "in_order": None}
    same = [arm("a", 100.0, 100.0), arm("b", 101.0, 101.0)]
    (found,) = tally(same).values()
    assert (found["wrong"]["near"], found["pairs"]) == (1.0, 0)  # such a check tells nothing


def test_times_come_from_other_runs() -> None:
    def timed(policy: str, ms: float | None, **more: Any) -> MeasuredRun:
        return run_of(policy=policy, service=ms, latencies_ms=TIMES[0].tolist(), **more)

    runs = [
        timed("coded", 1.0, encode=0.1, settings=1),
        timed("coded", 2.0, encode=0.2, settings=1),
        timed("uncoded", 3.0, settings=2),
        timed("hedge", 4.0, qps=90.0, settings=3),
        timed("hedge", None, qps=90.0, settings=4),
    ]
    lent = with_others_times(arms_of(runs))
    found = [[(r.service and r.service.ms, r.encode and r.encode.ms) for r in a.runs] for a in lent]
    assert found == [
        [(3.0, 0.2), (3.0, 0.1)],  # another policy's at this load; encoding has its own other run
        [(1.0, None)],
        [(1.0, None)],  # nobody else at this load has times
        [(None, None)],  # the base's
    ]
    (alone,) = with_others_times(arms_of(runs[:1]))
    assert alone.runs == (runs[0],)


def test_rows_of_the_benchmark_count_as_in_its_tables(tmp_path: Path) -> None:
    def made(label: str, **more: Any) -> dict[str, Any]:
        return {**latency_row(label, TIMES[0], **more), "policy": label, "qps": 180.0}

    old = [made("coded", run=run, wait_ms=1.0) for run in (1, 2)]
    lost = [made("uncoded"), made("uncoded", error="RuntimeError: no")]
    kept = [made("coded", run=run) for run in (1, 2)]
    path = write(tmp_path / "rows.jsonl", *old, ROW, *lost, *kept)
    runs = read_runs(path)
    assert [run.key for run in runs] == [None, *(row["key"] for row in kept)]
    assert [len(arm.runs) for arm in arms_of(runs)] == [1, 2]  # what others measured counts, too


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {**ROW, "name": "an\u2028arm"}, ROW)
    whole = path.read_bytes().rstrip(b"\n")
    path.write_bytes(whole)
    assert [found.name for found in read_runs(path)] == ["an\u2028arm", ROW["name"]]
    path.write_bytes(whole[:-5])
    (found,) = read_runs(path)
    assert found.name == "an\u2028arm"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no row of kind 'latency'"),
        ("{oops\n", "line 1 is not JSON"),
        ("{oops", "holds no row of kind 'latency'"),  # a line that is being written
        (json.dumps({**ROW, "latencies_ms": None}), "line 1: .*'histogram' or 'latencies_ms'"),
        (json.dumps({k: v for k, v in ROW.items() if k != "policy"}), "missing key 'policy'"),
    ],
)
def test_files_that_hold_no_runs(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_runs(path)
    with pytest.raises(UserError, match="cannot read the measured runs"):
        read_runs(tmp_path / "missing")


def test_lost_requests_are_infinitely_late() -> None:
    lost = [*TIMES[0][:980].tolist(), *[None] * 20]
    cells = compare(MeasuredArm((run_of(latencies_ms=lost),)), [np.full(1000, math.inf)])
    assert cells["p99"] == {"measured_ms": None, "simulated_ms": None}
    assert cells["p50"]["simulated_ms"] is None
