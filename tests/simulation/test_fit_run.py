from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.simulation.scenario import Accuracy, load_scenario
from tests.conftest import Command


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Workers 1 to 3 of 20 ms, of which the last takes twice as long; one task in fifty is late."""
    generator = np.random.default_rng(0)
    lines = ["worker,ms"]
    for worker in (1, 2, 3):
        late = np.where(generator.random(2000) < 0.02, 60 * (1 + generator.pareto(2, 2000)), 0)
        times = generator.uniform(19, 21, 2000) * (2 if worker == 3 else 1) + late
        lines += [f"{worker},{ms:.3f}" for ms in times]
    path = tmp_path / "tasks.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_scenario_that_can_be_simulated(tasks: Path, tmp_path: Path, call: Command) -> None:
    out, picture = tmp_path / "new" / "scenario.json", tmp_path / "fit.png"
    outcome = call("fit", tasks, "--out", out, "--bundle", "mnist", "--picture", picture, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["tasks"], report["workers"]) == (6000, {"3": 0, "1": 1, "2": 2})
    assert [s["kind"] for s in report["stragglers"]] == ["factor", "slow"]
    measured, fitted = report["quantiles_ms"]["0.99"]
    assert fitted == pytest.approx(measured, rel=0.15)
    was, comes = report["late_share"]
    assert was == pytest.approx(0.02, rel=0.2)
    assert comes == pytest.approx(was, rel=0.15)
    assert 0 < report["late_distance"] < 0.25  # of some hundred
    assert picture.stat().st_size > 5000
    scenario = load_scenario(out)
    assert (scenario.workers, scenario.policy, scenario.trip.mean_ms) == (3, "uncoded", 0)
    assert scenario.arrivals.qps == pytest.approx(0.5 * 3 / 0.0291, rel=0.05)
    assert (scenario.stragglers[0].kind, scenario.stragglers[0].worker) == ("factor", 0)
    simulated = json.loads(call("simulate", out, "--queries", "2000", "--json").out)
    assert simulated["p50_ms"] == pytest.approx(22, rel=0.2)
    words = ["--qps", "60", "--p999-ms", "900", "--policy", "uncoded", "--queries", "2000"]
    assert call("plan", "mnist", "--scenario", out, *words).code == 0


def test_the_rest_is_the_scenarios(tasks: Path, tmp_path: Path, call: Command) -> None:
    base, out = tmp_path / "base.json", tmp_path / "out.json"
    raw: dict[str, Any] = {"name": "ours", "arrivals": {"qps": 30}, "workers": 11, "k": 10}
    raw |= {"service": 1, "trip": 2, "encode": 0.5, "front_end": 3, "accuracy": {"normal": 0.5}}
    base.write_text(json.dumps({**raw, "policy": "uncoded"}))
    outcome = call("fit", tasks, "--out", out, "--scenario", base)
    assert outcome.code == 0, outcome.err
    assert "without waiting" in outcome.out  # what the times must be, and what a copy is
    told = [line for line in outcome.out.splitlines() if line.startswith("straggler")]
    assert ['"factor": 1.999' in told[0], "(worker 3)" in told[0], '"slow"' in told[1]] == [
        True
    ] * 3
    assert "(worker" not in told[1]
    scenario = load_scenario(out)
    assert (scenario.name, scenario.workers, scenario.k) == ("ours", 11, 10)
    assert scenario.service.mean_ms == pytest.approx(20, rel=0.01)
    assert (scenario.trip.mean_ms, scenario.encode.mean_ms, scenario.front_end.mean_ms) == (
        0,
        0.5,
        3,
    )
    assert scenario.accuracy == Accuracy(normal=0.5)
    assert "--encode-ms" not in outcome.out  # it is the scenario's
    assert json.loads(out.read_text())["trip"] == 0  # or `plan` would add what is usual
    assert "decode" not in json.loads(out.read_text())
    backup = {"small-backup": {"10": 0.9}}
    raw |= {"decode": 0, "encode": 0, "method_accuracy": backup, "policy": "uncoded"}
    base.write_text(json.dumps(raw))
    assert call("fit", tasks, "--out", out, "--scenario", base).code == 0
    written = json.loads(out.read_text())
    assert (written["decode"], written["encode"]) == (0, 0)
    assert call("fit", tasks, "--out", out, "--scenario", base, "--bundle", "mnist").code == 0
    with_bundle = load_scenario(out)
    assert (with_bundle.bundle, with_bundle.accuracy) == ("mnist", None)
    for bundle, kept in (("mnist", {"small-backup": {10: 0.9}}), ("cifar10", {})):
        base.write_text(json.dumps({**raw, "bundle": "mnist"}))
        assert call("fit", tasks, "--out", out, "--scenario", base, "--bundle", bundle).code == 0
        assert load_scenario(out).method_accuracy == kept


def test_a_scenario_with_fewer_workers(tasks: Path, tmp_path: Path, call: Command) -> None:
    """Which of the workers is the slow one makes no difference."""
    base, out = tmp_path / "base.json", tmp_path / "out.json"
    raw = {"arrivals": {"qps": 3}, "workers": 1, "policy": "uncoded", "service": 1}
    base.write_text(json.dumps(raw))
    outcome = call("fit", tasks, "--out", out, "--scenario", base)
    assert outcome.code == 0, outcome.err
    assert load_scenario(out).stragglers[0].worker == 0


def test_no_stragglers_are_said_to_be_none(tmp_path: Path, call: Command) -> None:
    path = tmp_path / "tasks.csv"
    path.write_text("a,5\n" * 200)
    outcome = call("fit", path, "--out", tmp_path / "out.json")
    assert outcome.code == 0, outcome.err
    assert "no stragglers" in outcome.out
    out = tmp_path / "out.json"
    assert f"codedinvnet plan BUNDLE --scenario {out} --encode-ms MS --qps" in outcome.out


def test_a_log_in_seconds_is_told_of(tasks: Path, tmp_path: Path, call: Command) -> None:
    """Its figures are told all the same, in as many digits as they need."""
    head, *lines = tasks.read_text().splitlines()
    split = [line.split(",") for line in lines]
    seconds = tmp_path / "seconds.csv"
    rows = (f"{worker},{float(ms) / 1000:.6f}" for worker, ms in split)
    seconds.write_text("\n".join([head, *rows]))
    medians = {}
    for path, unit in ((tasks, 1.0), (seconds, 1000.0)):
        outcome = call("fit", path, "--out", tmp_path / "out.json")
        assert outcome.code == 0, outcome.err
        assert ("are these seconds?" in outcome.out) == (unit > 1)
        (told,) = (line for line in outcome.out.splitlines() if line.startswith("0.5 "))
        medians[unit] = float(told.split()[1]) * unit
    assert medians[1000.0] == pytest.approx(medians[1.0], rel=0.01)


def test_refusals_leave_nothing(tasks: Path, tmp_path: Path, call: Command) -> None:
    out, base = tmp_path / "out.json", tmp_path / "base.json"
    base.write_text("{}")
    instant = tmp_path / "instant.csv"
    instant.write_text("a,0\n" * 100)
    for words, told in (
        ((tmp_path / "none.csv", "--out", out), "cannot read"),
        ((tasks, "--out", out, "--picture", tmp_path / "fit.foo"), "--picture"),
        ((tasks, "--out", tmp_path), "is a folder"),
        ((instant, "--out", out), "more than half of the tasks took 0 ms"),
        ((tasks, "--out", tasks), "fit: what is written may not be what is read"),
        ((tasks, "--out", out, "--picture", tmp_path / "." / "out.json"), "--picture"),
        ((tasks, "--out", out, "--bundle", "nothing"), "nothing"),
        ((tasks, "--out", out, "--scenario", base), "arrivals"),
    ):
        outcome = call("fit", *words)
        assert outcome.code == 2
        assert told in outcome.err
        assert outcome.err.count("\n") == 1
    assert not out.exists()
