from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.bench.latency_tables import lines_of
from codedinvnet.codes.mosaic import mosaic_rules
from codedinvnet.codes.rules import Parities
from codedinvnet.errors import UserError
from codedinvnet.simulation.figures import simulate_requests
from codedinvnet.simulation.measured import (
    MeasuredArm,
    MeasuredRun,
    arms_of,
    compare,
    read_runs,
    scenario_of,
    scenarios_of,
    table,
    tally,
)
from codedinvnet.simulation.scenario import Scenario
from tests.bench.canned import latency_row
from tests.simulation.scenarios import scenario

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
    "requests": 3000,
    "stragglers": [
        {"kind": "slow", "probability": 0.01, "delay": {"distribution": "pareto", "ms": 50}}
    ],
    "service": {"distribution": "empirical", "values_ms": [20, 22, 24]},
    "p50_ms": 25.0,
    "p99_ms": 80.0,
    "p99_ms_95": [50.0, 120.0],
    "p999_ms": None,
}


def made(label: str, milliseconds: np.ndarray, **more: Any) -> dict[str, Any]:
    """Return a row of `bench latency`."""
    return {**latency_row(label, milliseconds, **more), "policy": label, "qps": 180.0}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_scenarios(tmp_path: Path) -> None:
    other = {"kind": "simulated"}
    path = write(tmp_path / "rows.jsonl", other, ROW, {**ROW, "apart": True, "bundle": "cifar10"})
    (run, mosaic) = read_runs(path).runs
    base = scenario(queries=500, trip=0.5, front_end=2)
    found = scenario_of(run, base.updated(bundle="cifar10"))
    assert found.code == Parities(10)  # rows of before do not say it: there was no mosaic
    assert scenario_of(mosaic, base).code == mosaic_rules(10)
    assert (found.policy, found.workers, found.k) == ("coded", 11, 10)
    assert (found.arrivals.qps, found.arrivals.batch, found.queries) == (180, 10, 30_000)
    assert found.service.values_ms == (20, 22, 24)
    assert found.stragglers[0].probability == 0.01
    assert (found.trip.ms, found.front_end.ms) == (0.5, 2)  # the run does not say
    assert scenario_of(run, base.updated(queries=100_000)).queries == 1_000_000


def test_known_arrivals_are_repeated_with_other_draws() -> None:
    runs = [MeasuredRun.model_validate({**ROW, "requests": 40, "seed": seed}) for seed in (7, 8)]
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
    even = {"kind": "uniform", "qps": 1.0}  # the base's, which the row overrules
    assert scenario_of(runs[0], scenario(arrivals=even)).arrivals == found[0][0].arrivals
    unknown = MeasuredArm((runs[0], MeasuredRun.model_validate(ROW)))
    assert not unknown.seeded
    assert [len(own) for own in scenarios_of(unknown, scenario(queries=100))] == [3, 1]


def simulated(given: Scenario) -> np.ndarray:
    return simulate_requests(given)[0]


def test_a_simulated_run_meets_itself_and_no_slower_one() -> None:
    """What a run of another seed came to stands in for a measured one."""
    slow = {"kind": "slow", "probability": 0.02, "delay": {"distribution": "exponential", "ms": 50}}
    raw = {key: ROW[key] for key in ("policy", "workers", "k", "qps")}
    given = scenario(**raw, service=24, queries=60_000, stragglers=[slow])
    _, truth = simulate_requests(given.updated(seed=7))
    keys = [f"{name}_ms" for name in ("p50", "p99", "p999")]
    row = {**ROW, "batch": 1, "requests": 60_000, "service": 24, "stragglers": [slow]}
    row |= {key: truth[key] for key in keys}
    run = MeasuredRun.model_validate(row)
    again = compare(MeasuredArm((run,)), [simulated(scenario_of(run, given))])
    assert all(cell["agrees"] for cell in again.values())
    slower = run.model_copy(update={"service": given.service.model_copy(update={"ms": 30.0})})
    late = compare(MeasuredArm((run,)), [simulated(scenario_of(slower, given))])
    assert late["p50"]["agrees"] is False


def test_failed_runs_are_passed_over_and_open_percentiles_not_compared(tmp_path: Path) -> None:
    failed = {key: ROW[key] for key in ("schema_version", "kind", "name")} | {"error": "no luck"}
    lost = {**ROW, "error": None, "p50_ms": None, "p99_ms": None, "backup": True}
    (run,) = read_runs(write(tmp_path / "rows.jsonl", failed, lost)).runs
    assert compare(MeasuredArm((run,)), [requests(1.0, 1.0)]) == {}
    assert scenario_of(run, scenario()).method == "small-backup"


def requests(p50: float, p99: float, p999: float = math.inf) -> np.ndarray:
    """Return the latencies of a thousand requests that have these percentiles."""
    return np.repeat([p50, p99, p999], [500, 490, 10])


def test_agreement_is_within_a_share_or_the_interval_whichever_is_wider() -> None:
    run = MeasuredRun.model_validate(ROW)

    def agrees(p50: float, p99: float, given: MeasuredRun = run) -> list[bool | None]:
        cells = compare(MeasuredArm((given,)), [requests(p50, p99)])
        assert set(cells) == {"p50", "p99"}  # p99.9 was not measured
        return [cell["agrees"] for cell in cells.values()]

    assert agrees(28.7, 119.0) == [True, True]
    cells = compare(MeasuredArm((run,)), [requests(25, 25)])
    assert cells["p99"]["allowed_ms"] == [50.0, 120.0]
    assert agrees(28.8, 80) == [False, True]
    assert agrees(25, 121) == [True, False]
    assert agrees(25, math.inf) == [True, False]
    narrow = run.model_copy(update={"p99_ms_95": (79.0, 81.0)})
    assert agrees(25, 91.9, narrow) == [True, True]


def test_what_came_out_of_too_few_requests_is_no_judge() -> None:
    run = MeasuredRun.model_validate({**ROW, "requests": 1000, "p999_ms": 300.0})
    arm = MeasuredArm((run,))
    cells = compare(arm, [requests(28.8, math.inf)])
    assert [cell["agrees"] for cell in cells.values()] == [False, False, None]
    lines = table([{"name": arm.name, "runs": 1, "percentiles": cells}])
    assert "28.8 no" in lines[1]
    assert "never no" in lines[1]
    assert "300.0      never ?" in lines[1]
    assert lines[-2].startswith("2 of 2 ")
    assert (
        lines[-1]
        == "1 not judged (?): no interval, and fewer than ten requests beyond the percentile"
    )
    long = run.model_copy(update={"requests": 50_000})  # here 15 % mean something
    assert compare(MeasuredArm((long,)), [requests(25, 80)])["p999"]["agrees"] is False


SAMPLE = np.random.default_rng(0).exponential(20, (3, 1000))


def runs_of(latencies: Iterable[np.ndarray]) -> list[MeasuredRun]:
    """Return the runs of one arm whose thousand requests took so long, in ms."""
    rows = []
    for number, times in enumerate(latencies, start=1):
        ordered = np.sort(times)
        found = {f"p{n}_ms": ordered[place] for n, place in ((50, 499), (99, 989), (999, 998))}
        row = {**ROW, **found, "name": f"{ROW['name']}, run {number}", "requests": 1000}
        row |= {"p99_ms_95": None, "tail_ms": list(ordered[::-1][:100]), "key": str(number)}
        rows.append(MeasuredRun.model_validate(row))
    return rows


def test_runs_of_an_arm_are_one() -> None:
    runs = runs_of(SAMPLE)
    other = runs[1].model_copy(update={"key": "4", "settings": {"wait_ms": 1}})
    slower = runs[2].model_copy(update={"service": None})
    arms = arms_of([runs[0], runs[1], other, runs[2].model_copy(update={"p50_ms": 1.0}), slower])
    assert [len(arm.runs) for arm in arms] == [3, 1]
    assert arms[0].runs[2] == slower  # the newest of its key
    assert arms[0].name == "pareto/coded at 40 %"
    assert arms[1].name == "pareto/coded at 40 %, run 2"
    scenarios = scenarios_of(arms[0], scenario(queries=500, seed=3))
    assert [[s.seed for s in own] for own in scenarios] == [[3], [4], [5]]
    assert [own[0].service.values_ms for own in scenarios] == [(20, 22, 24), (20, 22, 24), ()]


def test_an_arms_percentiles_are_those_of_all_requests() -> None:
    everything = SAMPLE.ravel()
    (arm,) = arms_of(runs_of(SAMPLE))
    for name, place in (("p99", 2969), ("p999", 2996)):
        value, interval = arm.percentile(name) or (0, None)
        assert value == pytest.approx(np.sort(everything)[place])
        assert interval is not None
        assert interval[0] < value < interval[1]
    own = [run.p50_ms or 0 for run in arm.runs]
    value, _ = arm.percentile("p50") or (0, None)  # the tails do not reach down to it
    assert min(own) < value < max(own)
    cells = compare(arm, [requests(value, 90.0)] * 3)
    assert cells["p50"]["agrees"]
    assert cells["p999"]["agrees"] is False  # judged: three runs have an interval
    two = MeasuredArm(arm.runs[:2])
    assert compare(two, [requests(value, 90.0)] * 2)["p999"]["agrees"] is None
    tailless = MeasuredArm(tuple(run.model_copy(update={"tail_ms": ()}) for run in arm.runs))
    value, _ = tailless.percentile("p999") or (0, None)
    tops = [run.p999_ms or 0 for run in arm.runs]
    assert value == pytest.approx(math.prod(tops) ** (1 / 3))


def test_too_many_lost_requests_are_met_by_as_many_alone() -> None:
    lost: dict[str, Any] = {"p50_ms": 30.0, "p99_ms": None, "p99_ms_95": None, "requests": 1000}

    def cells(simulated: np.ndarray, **more: Any) -> dict[str, Any]:
        return compare(MeasuredArm((MeasuredRun.model_validate(ROW | lost | more),)), [simulated])

    assert set(cells(requests(30, 80))) == {"p50"}  # nobody says that any was lost
    assert set(cells(requests(30, 80), errors=10)) == {"p50", "p999"}  # 1 % are, and no more
    both = cells(requests(30, math.inf), errors=11)
    assert [cell["agrees"] for cell in both.values()] == [True, True, True]
    assert both["p99"]["measured_ms"] is both["p99"]["simulated_ms"] is None
    assert both["p99"]["allowed_ms"] == [None, None]
    one = cells(requests(30, 80, 90), errors=11)
    assert [cell["agrees"] for cell in one.values()] == [True, False, False]
    few = cells(requests(30, 80, 90), errors=9)
    assert [cell["agrees"] for cell in few.values()] == [True, None]
    assert cells(requests(30, 80, 90), tail_ms=[None] * 11) == one
    arms = [{"name": "arm", "runs": 1, "percentiles": found} for found in (both, one, few)]
    assert tally(arms) == (9, 7, 5, 3, 2, 1, 1)
    lines = table(arms)
    assert lines[1].count("never      never ok") == 2
    assert "never       80.0 no" in lines[2]
    assert lines[-3].startswith("2 of 7 ")
    assert lines[-1] == "1 not judged (-): the rows have no such percentile"


def test_a_run_that_lost_too_many_leaves_the_percentile_of_all() -> None:
    runs = runs_of(SAMPLE)
    tail = (None, None, *runs[2].tail_ms[2:])
    runs[2] = runs[2].model_copy(update={"p999_ms": None, "tail_ms": tail})
    found = MeasuredArm(tuple(runs)).percentile("p999")
    assert found is not None
    assert math.isfinite(found.value)
    assert found.interval is None


def test_rows_of_the_benchmark_count_as_in_its_tables(tmp_path: Path) -> None:
    sample = SAMPLE[0]
    old = [made("coded", sample, run=run, wait_ms=1.0) for run in (1, 2)]
    lost = [made("uncoded", sample), made("uncoded", sample, error="RuntimeError: no")]
    kept = [made("coded", sample, run=run) for run in (1, 2)]
    path = write(tmp_path / "rows.jsonl", *old, ROW, *lost, *kept)
    runs = read_runs(path).runs
    assert [run.key for run in runs] == [None, *(row["key"] for row in kept)]
    assert [len(arm.runs) for arm in arms_of(runs)] == [1, 2]  # what others measured counts, too
    (line,) = lines_of([*old, *lost, *kept])
    assert line.rows == tuple(kept)


def test_runs_that_differ_are_simulated_as_they_were_measured() -> None:
    """One run of three is nine times slower, and the simulations are the very same requests.

    The tail of all requests together is the slow run's: the geometric mean is much lower.
    """
    latencies = SAMPLE * np.array([[1], [1], [9]])
    runs = runs_of(latencies)
    for kept in (100, 10, 0):
        arm = MeasuredArm(
            tuple(run.model_copy(update={"tail_ms": run.tail_ms[:kept]}) for run in runs)
        )
        for cell in compare(arm, latencies).values():
            assert cell["simulated_ms"] == cell["measured_ms"]
    together = compare(MeasuredArm(tuple(runs)), latencies)
    own = [run.p99_ms or 0 for run in runs]
    assert together["p99"]["measured_ms"] > 1.5 * math.prod(own) ** (1 / 3)


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {**ROW, "name": "an\u2028arm"}, ROW)
    whole = path.read_bytes().rstrip(b"\n")
    path.write_bytes(whole)
    assert [found.name for found in read_runs(path).runs] == ["an\u2028arm", ROW["name"]]
    path.write_bytes(whole[:-5])
    (found,) = read_runs(path).runs
    assert found.name == "an\u2028arm"
    path.write_bytes(whole.replace(b"{", b"", 1))
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_runs(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no row of kind 'latency'"),
        ("{oops\n", "line 1 is not JSON"),
        ("{oops", "holds no row of kind 'latency'"),  # a line that is being written
        (json.dumps({"kind": "simulated"}), "holds no row"),
        (json.dumps({**ROW, "p50_ms": "fast"}), "line 1: p50_ms: input should be a valid number"),
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
