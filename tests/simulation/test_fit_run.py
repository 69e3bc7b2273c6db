from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.simulation.scenario import load_scenario
from tests.conftest import Command


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Three workers of 20 ms, of which the last takes twice as long; one task in fifty is late."""
    generator = np.random.default_rng(0)
    lines = ["worker,ms"]
    for worker in range(3):
        late = np.where(generator.random(2000) < 0.02, 60 * (1 + generator.pareto(2, 2000)), 0)
        times = (generator.uniform(19, 21, 2000) + late) * (2 if worker == 2 else 1)
        lines += [f"{worker},{ms:.3f}" for ms in times]
    path = tmp_path / "tasks.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_scenario_that_can_be_simulated(tasks: Path, tmp_path: Path, call: Command) -> None:
    out, picture = tmp_path / "new" / "scenario.json", tmp_path / "fit.png"
    outcome = call("fit", tasks, "--out", out, "--bundle", "mnist", "--picture", picture, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["tasks"], report["workers"]) == (6000, 3)
    assert [s["kind"] for s in report["stragglers"]] == ["factor", "slow"]
    measured, fitted = report["quantiles_ms"]["0.99"]
    assert fitted == pytest.approx(measured, rel=0.15)
    assert report["distance"] < 0.02
    assert picture.stat().st_size > 5000
    scenario = load_scenario(out)
    assert (scenario.workers, scenario.policy, scenario.trip.mean_ms) == (3, "uncoded", 0)
    assert scenario.arrivals.qps == pytest.approx(0.5 * 3 / 0.0221, rel=0.05)
    assert scenario.stragglers[0].worker == 2
    simulated = json.loads(call("simulate", out, "--queries", "2000", "--json").out)
    assert simulated["p50_ms"] == pytest.approx(22, rel=0.2)
    words = ["--qps", "60", "--p999-ms", "900", "--policy", "uncoded", "--queries", "2000"]
    assert call("plan", "mnist", "--scenario", out, *words).code == 0


def test_the_rest_is_the_scenarios(tasks: Path, tmp_path: Path, call: Command) -> None:
    base, out = tmp_path / "base.json", tmp_path / "out.json"
    raw = {"name": "ours", "arrivals": {"qps": 30}, "workers": 11, "k": 10, "service": 1, "trip": 2}
    base.write_text(json.dumps({**raw, "encode": 0.5, "front_end": 3}))
    outcome = call("fit", tasks, "--out", out, "--scenario", base)
    assert outcome.code == 0, outcome.err
    assert "worker 2 takes 1.997 times as long" in outcome.out
    assert "of the tasks are delayed by a Pareto time of" in outcome.out
    assert "measured ms   fitted ms" in outcome.out
    scenario = load_scenario(out)
    assert (scenario.name, scenario.workers, scenario.policy) == ("ours", 11, "coded")
    assert scenario.service.mean_ms == pytest.approx(20, rel=0.01)
    assert (scenario.trip.mean_ms, scenario.encode.mean_ms, scenario.front_end.mean_ms) == (
        0,
        0.5,
        3,
    )


def test_no_stragglers_are_said_to_be_none(tmp_path: Path, call: Command) -> None:
    path = tmp_path / "tasks.csv"
    path.write_text("a,5\n" * 200)
    outcome = call("fit", path, "--out", tmp_path / "out.json")
    assert outcome.code == 0, outcome.err
    assert "no stragglers" in outcome.out
    assert "codedinvnet plan BUNDLE --scenario" in outcome.out
    assert "codedinvnet simulate" not in outcome.out  # which needs to know an accuracy


def test_refusals_leave_nothing(tasks: Path, tmp_path: Path, call: Command) -> None:
    out, base = tmp_path / "out.json", tmp_path / "base.json"
    base.write_text(
        json.dumps({"arrivals": {"qps": 3}, "workers": 2, "policy": "uncoded", "service": 1})
    )
    for words, told in (
        ((tmp_path / "none.csv", "--out", out), "cannot read"),
        ((tasks, "--out", out, "--picture", tmp_path / "fit.foo"), "--picture"),
        ((tasks, "--out", tmp_path), "is a folder"),
        ((tasks, "--out", out, "--bundle", "nothing"), "nothing"),
        ((tasks, "--out", out, "--scenario", base), "names more than the 2 workers"),
    ):
        outcome = call("fit", *words)
        assert outcome.code == 2
        assert told in outcome.err
        assert outcome.err.count("\n") == 1
    assert not out.exists()
