"""`simulate`, from the command line to what it prints."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from codedinvnet.files import file_digest
from codedinvnet.models.bundle import load_bundle
from codedinvnet.serving.policies import SERVED
from codedinvnet.simulation import picture as drawing
from codedinvnet.simulation import run
from codedinvnet.simulation.sweep import frame_of, read_rows, winners
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
    figures = load_bundle("mnist").info.figures["test_k4"]
    assert report["accuracy"] == pytest.approx(figures["normal_accuracy"])
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


def test_an_accuracy_that_nobody_knows_is_not_never(file: Path, call: Command) -> None:
    known = {"normal": 0.99, "recovered": {"1": {"4": 0.9}}}  # and not of what is guessed
    file.write_text(json.dumps({**SCENARIO, "accuracy": known, "policy": "coded+guess"}))
    outcome = call("simulate", file, "--qps", "900")
    assert outcome.code == 0
    found = dict(line.split(maxsplit=1) for line in outcome.out.splitlines() if line)
    assert found["accuracy"] == "not known"


def measured_row(**changes: Any) -> dict[str, Any]:
    row = {"schema_version": 1, "kind": "latency", "name": "idle", "policy": "uncoded"}
    row |= {"workers": 11, "k": 10, "qps": 10, "requests": 400, "service": 20}
    return {**row, "latencies_ms": [*[21] * 395, *[200] * 5], **changes}


def test_measured_runs_are_repeated_and_compared(file: Path, tmp_path: Path, call: Command) -> None:
    row = measured_row()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    report = json.loads(call("simulate", file, "--measured", rows, "--json").out)
    assert set(report["percentiles"]) == {"p50"}  # of 400 requests four are beyond p99
    assert (report["percentiles"]["p50"]["near"], report["percentiles"]["p50"]["pairs"]) == (1, 0)
    (arm,) = report["arms"]
    assert arm["percentiles"]["p50"]["simulated_ms"] == pytest.approx(20)
    assert (arm["runs"], arm["simulated_requests"]) == (1, 570)
    assert report["own_times"] is True
    lines = call("simulate", file, "--measured", rows).out.splitlines()
    assert lines[-1].split()[:5] == ["p50", "1", "0", "100.0%", "-"]
    out = tmp_path / "results" / "validation.json"
    words = ("--measured", rows, "--queries", "1000", "--seed", "3", "--out", out, "--json")
    written = json.loads(call("simulate", file, *words).out)
    assert json.loads(out.read_text()) == written
    assert written["base"]["seed"] == 3  # with the row it makes the scenario, which is left out
    (again,) = written["arms"]
    assert again["simulated_requests"] == 950
    assert again["same_arrivals"] is False
    rows.write_text(json.dumps({**row, "seed": 7}) + "\n")
    (known,) = json.loads(call("simulate", file, *words).out)["arms"]
    assert known["same_arrivals"] is True
    assert known["simulated_requests"] == 3 * 400
    rows.write_text(json.dumps(row) + "\n")
    assert written["measured_digest"] == file_digest(rows)
    for option, value in (("policy", "coded"), ("workers", "50"), ("stragglers", "none")):
        outcome = call("simulate", file, "--measured", rows, f"--{option}", value)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"--{option}: {rows} says itself what its runs were" in outcome.err


def test_what_is_simulated_of_a_mosaic_is_its_own_code(
    file: Path, tmp_path: Path, call: Command
) -> None:
    """One parity makes up for several members, and the accuracy is the bundle's."""
    words = ("--stragglers", "exponential", "--k", "10", "--queries", "3000", "--json")
    mosaic = tmp_path / "mosaic.json"
    mosaic.write_text(json.dumps({**SCENARIO, "bundle": "cifar10"}))
    mean, apart = (json.loads(call("simulate", path, *words).out) for path in (file, mosaic))
    assert apart["decoded_share"] > 1.2 * mean["decoded_share"]
    figures = load_bundle("cifar10").info.figures["test_k10"]
    assert figures["recovered_accuracy"] < apart["accuracy"] < figures["normal_accuracy"]
    sweep, out = tmp_path / "sweep.json", tmp_path / "rows.jsonl"
    base = {**SCENARIO, "bundle": "cifar10", "k": 10}
    sweep.write_text(
        json.dumps({"base": base, "loads": [0.3], "stragglers": ["none"], "policies": ["coded"]})
    )
    assert call("simulate", sweep, "--out", out).code == 0
    assert json.loads(out.read_text())["decoded_share"] > 0


def test_there_is_no_accuracy_of_a_backup_that_nobody_gave(tmp_path: Path, call: Command) -> None:
    path = tmp_path / "backup.json"
    path.write_text(json.dumps({**SCENARIO, "method": "small-backup"}))
    report = json.loads(call("simulate", path, "--json").out)
    assert not {"accuracy", "accuracy_95"} & set(report)
    assert report["decoded_share"] is not None
    known = {"policy": "hedge", "method_accuracy": {"small-backup": {"4": 0.5, "10": 0.1}}}
    path.write_text(json.dumps({**SCENARIO, **known}))
    words = ("--policy", "small-backup", "--stragglers", "exponential", "--json")
    report = json.loads(call("simulate", path, *words).out)
    assert report["scenario"]["method"] == "small-backup"
    assert "policy" not in report["scenario"]  # coded, which is the default
    normal = load_bundle("mnist").info.figures["test_k4"]["normal_accuracy"]
    share = report["decoded_share"]
    assert share > 0
    assert report["accuracy"] == pytest.approx(normal - share * (normal - 0.5), abs=1e-3)


def test_a_sweep_writes_rows_and_a_map(
    tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, picture = (tmp_path / name for name in ("sweep.json", "rows.jsonl", "map.png"))
    sweep = {"base": {**SCENARIO, "k": 10}, "loads": [0.3, 0.6], "stragglers": ["none", "hung"]}
    path.write_text(json.dumps({**sweep, "policies": ["uncoded", "coded", "hedge"]}))
    figures: list[Figure] = []
    monkeypatch.setattr(drawing, "write_picture", lambda _, figure: figures.append(figure))
    outcome = call("simulate", path, "--out", out, "--picture", picture)
    assert outcome.code == 0
    assert len(out.read_text().splitlines()) == 12
    (axis,) = figures[0].axes
    best = winners(frame_of(read_rows(out)))
    drawn = {patch.get_xy(): patch for patch in axis.patches if isinstance(patch, Rectangle)}
    assert len(drawn) == 4
    for line in best.itertuples():
        place = ([0.3, 0.6].index(line.load), ["none", "hung"].index(line.stragglers))
        assert drawn[place].get_facecolor() == to_rgba(drawing.colour(line.policy))
        assert (drawn[place].get_hatch() is not None) == line.contested
    assert [label.get_text() for label in axis.get_yticklabels()] == ["none", "hung"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["30%", "60%"]
    assert "winner" in outcome.out
    assert "hung, 1, 30%: The run lasts 1.8 s" in outcome.out  # the same under every policy
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend[-1] == "contested (by 5 % where no interval is)"
    report = json.loads(call("simulate", path, "--out", out, "--json").out)
    assert report["rows"] == 12
    assert len(report["wins"]) == 4
    assert [note.split(":")[0] for note in report["notes"]] == ["hung, 1, 30%", "hung, 1, 60%"]
    assert call("simulate", path).code == 2
    assert call("simulate", path, "--out", out, "--seed", "1").code == 2


def test_a_sweep_leaves_out_guesses_that_its_bundle_cannot_make(
    tmp_path: Path, call: Command
) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "rows.jsonl"
    base = {**SCENARIO, "bundle": "cifar10", "queries": 200}
    sweep = {"base": base, "loads": [0.3], "stragglers": ["none"]}
    path.write_text(json.dumps(sweep))
    assert call("simulate", path, "--out", out).code == 0
    found = {json.loads(line)["cell"]["policy"] for line in out.read_text().splitlines()}
    assert found == set(SERVED) - {"coded+guess"}
    path.write_text(json.dumps({**sweep, "policies": ["coded", "coded+guess"]}))
    outcome = call("simulate", path, "--out", out)
    assert outcome.code == 2
    assert (
        "policies: coded+guess needs a bundle that guesses, which cifar10 does not" in outcome.err
    )


def test_groups_are_coded_before_the_deadline(file: Path, call: Command) -> None:
    file.write_text(json.dumps({**SCENARIO, "deadline_ms": 20}))
    outcome = call("simulate", file)
    assert outcome.code == 2
    assert "group_timeout_ms must be below the deadline of 20 ms, got 20" in outcome.err
    file.write_text(json.dumps({**SCENARIO, "deadline_ms": 20, "policy": "uncoded"}))
    assert call("simulate", file).code == 0


@pytest.mark.timeout(60)
def test_a_scenario_is_read_once_and_may_be_a_pipe(
    file: Path, tmp_path: Path, call: Command
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()), daemon=True)
    write.start()
    assert json.loads(call("simulate", pipe, "--json").out)["scenario"]["name"] == "small"


def test_a_picture_of_no_format_is_refused_before_the_sweep(tmp_path: Path, call: Command) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "rows.jsonl"
    sweep = {"base": {**SCENARIO, "k": 10}, "loads": [0.3], "stragglers": ["none"]}
    path.write_text(json.dumps(sweep))
    outcome = call("simulate", path, "--out", out, "--picture", tmp_path / "map.foo")
    assert outcome.code == 2
    assert outcome.err.endswith("map.foo does not end in one of .png, .pdf, .svg\n")
    assert not out.exists()


def test_an_accuracy_that_nobody_knows_is_told_before_the_sweep(
    tmp_path: Path, call: Command
) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "rows.jsonl"
    sweep = {"base": {**SCENARIO, "r": 2}, "loads": [0.3], "stragglers": ["none"]}
    path.write_text(json.dumps({**sweep, "policies": ["uncoded", "coded"]}))
    outcome = call("simulate", path, "--out", out)
    assert outcome.code == 2
    assert outcome.err.endswith("no accuracy is known of groups of 4 with r = 2; known: none\n")
    assert not out.exists()  # the uncoded cell would have come first


def test_what_cannot_be_written_or_is_not_known_is_told_before_measured_runs_are_repeated(
    file: Path, tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulated(*_: object, **__: object) -> None:
        raise AssertionError("simulated")

    monkeypatch.setattr(run, "simulate_requests", simulated)
    arm = measured_row(name="first")
    rows = tmp_path / "rows.jsonl"
    coded = {**arm, "policy": "coded", "r": 2, "workers": 12, "name": "second"}
    rows.write_text(json.dumps(arm) + "\n" + json.dumps(coded) + "\n")
    outcome = call("simulate", file, "--measured", rows, "--out", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "cannot write to" in outcome.err
    outcome = call("simulate", file, "--measured", rows)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "no accuracy is known of groups of 10 with r = 2" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "3"], "3 workers are too few: policy coded"),
        (["--policy", "prayer"], "--policy: 'prayer' is not one of uncoded"),
        (["--qps", "0"], "arrivals.qps"),
        (["--stragglers", "sleepy"], "neither a file nor one of"),
        (["--stragglers", "held", "--batch", "-5"], "--batch: must be at least 1, got -5"),
        (["--batch", "0"], "--batch: must be at least 1, got 0"),
        (["--extra", "-1"], "--extra: must be at least 0, got -1"),
        (["--queries", "1000000000000"], "queries: input should be less than or equal to 10"),
        (["--measured", "missing.jsonl"], "measured runs missing.jsonl: No such file"),
        (["--picture", "map.png"], "--picture belongs to a sweep"),
        (["--quick"], "--quick belongs to a sweep"),
        (
            ["--out", "report.json"],
            "--out belongs to a sweep (see configs/bench), or to --measured",
        ),
        (["--r", "2"], "no accuracy is known of groups of 2 with r = 2; known: none"),
        (["--k", "11", "--workers", "20"], "no accuracy is known of groups of 11"),
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


def test_what_is_read_is_not_written_over(file: Path, tmp_path: Path, call: Command) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "also").symlink_to(rows)
    before = file.read_bytes(), rows.read_bytes()
    for out in (rows, file, tmp_path / "also"):
        outcome = call("simulate", file, "--measured", rows, "--out", out)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == f"error: --out: {out} would overwrite what is read\n"
    assert (file.read_bytes(), rows.read_bytes()) == before


def test_guesses_need_something_to_guess_from(file: Path, call: Command) -> None:
    for bundle, code in (("cifar10", 2), ("mnist", 0)):
        raw = {key: value for key, value in SCENARIO.items() if key != "accuracy"}
        file.write_text(json.dumps({**raw, "bundle": bundle, "queries": 200}))
        outcome = call("simulate", file, "--policy", "coded+guess")
        assert outcome.code == code, outcome.err
        assert ("policy coded+guess needs a code that can guess" in outcome.err) == (code == 2)


@pytest.mark.parametrize("name", ["trip", "encode", "front_end", "decode"])
def test_times_without_a_mean_are_refused(name: str, file: Path, call: Command) -> None:
    endless = {"distribution": "pareto", "ms": 1, "shape": 1}
    file.write_text(json.dumps({**SCENARIO, name: endless}))
    outcome = call("simulate", file)
    assert outcome.code == 2
    assert f"{name} must take a finite time in the mean" in outcome.err


def test_simulate_tells_of_an_overload_and_of_a_short_run(file: Path, call: Command) -> None:
    words = ("--policy", "uncoded", "--queries", "3000")
    assert json.loads(call("simulate", file, *words, "--json").out)["notes"] == []
    outcome = call("simulate", file, *words, "--qps", "1200", "--stragglers", "exponential")
    lines = outcome.out.splitlines()
    assert any("Overloaded: data tasks alone keep 13.2 workers busy" in line for line in lines)
    assert any("the rarest event (hang timeout) comes every 3 s" in line for line in lines)
