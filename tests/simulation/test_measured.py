from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.simulation.figures import simulate
from codedinvnet.simulation.measured import (
    MeasuredRun,
    compare,
    read_runs,
    scenario_of,
    table,
)
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


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_scenarios(tmp_path: Path) -> None:
    other = {"kind": "simulated"}
    (run,) = read_runs(write(tmp_path / "rows.jsonl", other, ROW))
    base = scenario(queries=500, trip=0.5, front_end=2)
    found = scenario_of(run, base)
    assert (found.policy, found.workers, found.k) == ("coded", 11, 10)
    assert (found.arrivals.qps, found.arrivals.batch, found.queries) == (180, 10, 30_000)
    assert found.service.values_ms == (20, 22, 24)
    assert found.stragglers[0].probability == 0.01
    assert (found.trip.ms, found.front_end.ms) == (0.5, 2)  # the run does not say
    assert scenario_of(run, base.updated(queries=100_000)).queries == 100_000


def test_a_simulated_run_meets_itself_and_no_slower_one() -> None:
    """What a run of another seed came to stands in for a measured one."""
    slow = {"kind": "slow", "probability": 0.02, "delay": {"distribution": "exponential", "ms": 50}}
    raw = {key: ROW[key] for key in ("policy", "workers", "k", "qps")}
    given = scenario(**raw, service=24, queries=30_000, stragglers=[slow])
    truth = simulate(given.updated(seed=7))
    keys = [f"{name}_ms" for name in ("p50", "p99", "p999")]
    row = {**ROW, "batch": 1, "requests": 30_000, "service": 24, "stragglers": [slow]}
    row |= {key: truth[key] for key in keys}
    run = MeasuredRun.model_validate(row)
    again = compare(run, simulate(scenario_of(run, given)))
    assert all(cell["agrees"] for cell in again.values())
    slower = run.model_copy(update={"service": given.service.model_copy(update={"ms": 30.0})})
    assert not compare(run, simulate(scenario_of(slower, given)))["p50"]["agrees"]


def test_failed_runs_are_passed_over_and_open_percentiles_not_compared(tmp_path: Path) -> None:
    failed = {key: ROW[key] for key in ("schema_version", "kind", "name")} | {"error": "no luck"}
    lost = {**ROW, "error": None, "p50_ms": None, "p99_ms": None, "backup": True}
    (run,) = read_runs(write(tmp_path / "rows.jsonl", failed, lost))
    assert compare(run, {"p50_ms": 1.0, "p99_ms": 1.0, "p999_ms": 1.0}) == {}
    assert scenario_of(run, scenario()).backup


def figures(p50: float, p99: float | None) -> dict[str, Any]:
    return {"p50_ms": p50, "p99_ms": p99, "p999_ms": 1.0}


def test_agreement_is_within_a_share_or_the_interval_whichever_is_wider() -> None:
    run = MeasuredRun.model_validate(ROW)
    found = compare(run, figures(28.7, 119.0))
    assert set(found) == {"p50", "p99"}  # p99.9 was not measured
    assert found["p50"]["agrees"]
    assert found["p99"]["agrees"]
    assert found["p99"]["allowed_ms"] == [50.0, 120.0]
    assert not compare(run, figures(28.8, 80))["p50"]["agrees"]
    assert not compare(run, figures(25, 121))["p99"]["agrees"]
    assert not compare(run, figures(25, None))["p99"]["agrees"]
    narrow = run.model_copy(update={"p99_ms_95": (79.0, 81.0)})
    assert compare(narrow, figures(25, 91.9))["p99"]["agrees"]
    lines = table([{"name": run.name, "percentiles": compare(run, figures(28.8, None))}])
    assert "28.8 no" in lines[1]
    assert "never no" in lines[1]
    assert lines[-1].startswith("0 of 2 percentiles within 15%")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no row of kind 'latency'"),
        ("{oops", "is not JSONL"),
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
