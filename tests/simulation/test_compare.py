"""`plan`: policies on numbers of machines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.common.files import read_json
from codedinvnet.simulation.compare import POLICIES, compare, fewest
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import summarise
from codedinvnet.simulation.scenario import parse_scenario
from tests.conftest import Command
from tests.simulation.scenarios import scenario

PARETO = {
    "kind": "slow",
    "probability": 0.02,
    "delay": {"distribution": "pareto", "ms": 60, "shape": 1.5},
}
BASE = scenario(
    qps=200, service=20, queries=4000, workers=200, k=4, stragglers=[PARETO], hang_timeout_ms=900
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three workers of 20 ms, of which one takes twice as long; one task in fifty is late."""
    generator = np.random.default_rng(0)
    lines = ["worker,ms"]
    for worker in ("a", "b", "slow"):
        late = np.where(generator.random(2000) < 0.02, 60 * (1 + generator.pareto(2, 2000)), 0)
        times = generator.uniform(19, 21, 2000) * (2 if worker == "slow" else 1) + late
        lines += [f"{worker},{ms:.3f}" for ms in times]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines))
    return path


def test_policies_meet_the_same_load_on_each_number_of_machines() -> None:
    base = BASE.updated(queries=1500)
    rows, left = compare(base, ("uncoded", "hedge", "coded"), (12, 4, 8))
    places = [(row["policy"], row["workers"]) for row in rows]
    assert places == [(p, n) for p in ("uncoded", "hedge", "coded") for n in (8, 12)] or left
    assert list(left) == ["coded on 4"]
    for row in rows:
        given = base.updated(policy=row["policy"], workers=row["workers"])
        found = summarise(Simulation(given).run(), given)
        assert {key: row[key] for key in found} == found


@pytest.mark.parametrize(("policy", "target"), [("hedge", 150.0), ("small-backup", 60.0)])
def test_the_fewest_machines_are_those_that_counting_up_finds(policy: str, target: float) -> None:
    found = fewest(BASE, policy, target)
    assert found["workers"] is not None
    assert found["p999_ms"] <= target
    near = range(max(5, found["workers"] - 3), found["workers"] + 1)
    first = next(
        row["workers"]
        for row in compare(BASE, [policy], near)[0]
        if row["p999_ms"] is not None and row["p999_ms"] <= target and not row["drifting"]
    )
    assert found["workers"] - 2 <= first  # other draws may need one more


def test_a_log_is_planned_for(log: Path, tmp_path: Path, call: Command) -> None:
    out = tmp_path / "new" / "scenario.json"
    words = ("--qps", "60", "--queries", "2000", "--p999-ms", "200")
    outcome = call("plan", log, *words, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    numbers = {row["policy"]: row["workers"] for row in report["rows"]}
    assert set(numbers) == set(POLICIES)
    assert numbers["hedge"] < 11 <= numbers["small-backup"]  # which needs k + 1
    assert list(numbers.values()) == sorted(numbers.values(), key=lambda n: n or 1e9)
    found = parse_scenario(read_json(out), str(out))
    assert [s.kind for s in found.stragglers] == ["factor", "slow"]
    assert (found.arrivals.qps, found.trip.ms) == (60, 0)
    assert found.service.mean_ms == pytest.approx(20, rel=0.01)
    run = call("simulate", out, "--policy", "hedge", "--workers", "8", "--json")
    assert json.loads(run.out)["work_per_query"] > 1
    lines = call("plan", log, *words, "--policy", "hedge").out.splitlines()
    assert lines[0].startswith("6000 tasks of 3 workers")
    assert '"factor": ' in lines[1]
    assert lines[1].endswith("(slow)")
    assert any(line.startswith("0.99 ") for line in lines)
    assert lines[-1].split()[:2] == ["hedge", str(numbers["hedge"])]


def test_a_scenario_is_planned_for_on_given_machines(tmp_path: Path, call: Command) -> None:
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps(BASE.model_dump(mode="json", exclude_defaults=True)))
    words = ["--bundle", "mnist", "--qps", "60", "--encode-ms", "1", "--policy", "coded"]
    words += ["--policy", "hedge", "--queries", "1000"]
    given = ("--workers", "8", "--workers", "6")
    rows = json.loads(call("plan", path, *words, *given, "--json").out)["rows"]
    assert [(row["policy"], row["workers"]) for row in rows] == [
        ("coded", 6), ("coded", 8), ("hedge", 6), ("hedge", 8),
    ]  # fmt: skip
    assert [row["decoded_share"] > 0 for row in rows] == [True, True, False, False]
    assert rows[0]["work_per_query"] > 1.1
    some = json.loads(call("plan", path, *words, "--json").out)
    loads = [row["load"] for row in some["rows"] if row["policy"] == "hedge"]
    assert len(loads) == 5
    assert loads[0] <= 0.8
    late = call("plan", path, *words, *given, "--p999-ms", "1").out
    assert "misses the target" in late
    busy = call("plan", path, "--policy", "uncoded", "--qps", "900", "--queries", "900")
    assert "One front end would be" not in busy.out  # it takes no time in this scenario


REFUSED: list[tuple[list[str], str]] = [
    (["LOG"], "--qps: a log does not say the load"),
    (["LOG", "--qps", "60", "--policy", "prayer"], "'prayer' is not one of uncoded"),
    (["LOG", "--qps", "60", "--workers", "0"], "--workers: must be above 0, got 0"),
    (["LOG", "--qps", "60", "--p999-ms", "-1"], "--p999-ms: must be above 0, got -1"),
    (["LOG", "--qps", "60", "--p999-ms", "0"], "--p999-ms: must be above 0, got 0"),
    (["LOG", "--qps", "60", "--p999-ms", "nan"], "--p999-ms: must be above 0, got nan"),
    (["LOG", "--qps", "-60"], "arrivals.qps"),
    (["LOG", "--qps", "60", "--bundle", "nothing"], "no bundle 'nothing'"),
    (["LOG", "--qps", "60", "--policy", "coded"], "7 workers are too few: policy coded"),
    (["LOG", "--qps", "60", "--stragglers", "sleepy"], "neither a file nor one of"),
    (["LOG", "--qps", "60", "--out", "LOG"], "would overwrite what is read"),
    *((["FILE", text], why) for text, why in (("[]", "neither a log"), ("{", "is not JSON"))),
    (["FILE", "{}"], "arrivals"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_plan_refuses_in_one_line(
    words: list[str], message: str, log: Path, tmp_path: Path, call: Command
) -> None:
    if words[0] == "FILE":
        log = tmp_path / "scenario.json"
        log.write_text(words[1])
        words = ["LOG"]
    outcome = call("plan", *[str(log) if word == "LOG" else word for word in words])
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
