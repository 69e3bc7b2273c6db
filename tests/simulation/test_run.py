"""`simulate`, from the command line to what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

SCENARIO: dict[str, Any] = {
    "name": "small",
    "bundle": "mnist",
    "queries": 600,
    "arrivals": {"qps": 300},
    "workers": 11,
    "policy": "coded",
    "k": 4,
    "service": {"distribution": "exponential", "ms": 10},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps(SCENARIO))
    return path


def test_simulate_prints_one_report(file: Path, call: Command) -> None:
    given = "--policy hedge --workers 7 --qps 200 --seed 5 --extra 0.01 --json"
    words = given.split()
    outcome = call("simulate", file, *words)
    assert outcome.code == 0
    report = json.loads(outcome.out)
    changed = report["scenario"]
    assert (changed["policy"], changed["workers"], changed["seed"]) == ("hedge", 7, 5)
    assert changed["arrivals"]["qps"] == 200
    assert 1 < report["tasks_per_query"] <= 1.01
    assert report["queries"] == 600
    assert report["decoded_share"] == 0
    assert {"machine", "commit", "p999_ms", "utilisation"} <= set(report)
    assert "600/600" in outcome.err  # the progress bar, which is gone to its end
    again = json.loads(call("simulate", file, *words).out)
    for figure in ("p50_ms", "p99_ms", "tasks_per_query"):
        assert again[figure] == report[figure]


def test_simulate_prints_lines(file: Path, call: Command) -> None:
    outcome = call("simulate", file, "--stragglers", "slower", "--batch", "4", "--k", "2")
    assert outcome.code == 0
    found = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    value, interval = found["p50_ms"].split(maxsplit=1)
    assert float(value) > 0
    low, _, high = interval.strip("()").split()
    assert float(low) <= float(value) <= float(high)
    assert found["p999_ms"].endswith("(the run is too short for an interval)")
    assert json.loads(found["scenario"])["stragglers"][0]["factor"] == 3
    assert not {"kind", "notes", "p50_ms_95"} & set(found)
    scenario = json.loads(file.read_text())
    file.write_text(json.dumps({**scenario, "policy": "uncoded", "deadline_ms": 20}))
    outcome = call("simulate", file, "--qps", "3000")
    found = dict(line.split(maxsplit=1) for line in outcome.out.splitlines() if line)
    assert found["p999_ms"] == "never: too many requests were lost"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "3"], "3 workers are too few: policy coded"),
        (["--policy", "small-backup", "--r", "2"], "small-backup has r = 1"),
        (["--policy", "prayer"], "--policy: 'prayer' is not one of uncoded"),
        (["--qps", "0"], "arrivals.qps"),
        (["--stragglers", "sleepy"], "neither a file nor one of"),
        (["--stragglers", "held", "--batch", "-5"], "--batch: must be at least 1, got -5"),
        (["--batch", "0"], "--batch: must be at least 1, got 0"),
        (["--extra", "-1"], "--extra: must be at least 0, got -1"),
        (["--queries", "1000000000000"], "queries: input should be less than or equal to 10"),
    ],
)
def test_simulate_refuses_in_one_line(
    file: Path, words: list[str], message: str, call: Command
) -> None:
    outcome = call("simulate", file, *words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_simulate_tells_of_an_overload_and_of_a_short_run(file: Path, call: Command) -> None:
    words = ("--policy", "uncoded", "--queries", "3000")
    assert json.loads(call("simulate", file, *words, "--json").out)["notes"] == []
    outcome = call("simulate", file, *words, "--qps", "1200", "--stragglers", "exponential")
    lines = outcome.out.splitlines()
    assert any("Overloaded: data tasks alone keep 13.2 workers busy" in line for line in lines)
    assert any("the rarest event (hang timeout) comes every 3 s" in line for line in lines)
