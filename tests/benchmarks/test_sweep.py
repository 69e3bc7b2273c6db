from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweep as module
from benchmarks.policies import members
from benchmarks.sweep import KIND, Point, Sweep, read_rows, run_sweep, warnings_of
from codedinvnet.codes import registry
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json
from codedinvnet.common.grid import Cell, append_row
from codedinvnet.simulation.figures import simulate
from codedinvnet.simulation.scenario import parse_scenario
from tests.conftest import Command
from tests.simulation.scenarios import scenario

SWEEP = Sweep(
    base=scenario(workers=6, k=4, queries=300),
    loads=(0.2, 0.5),
    policies=("uncoded", "coded"),
    stragglers=("none", "held"),
    batches=(1, 4),
)


def row(load: float, policy: str, late: float | None, **cell: Any) -> dict[str, Any]:
    place = {"stragglers": "held", "batch": 1, "load": load, "policy": policy, **cell}
    interval = None if late is None else [0.9 * late, 1.1 * late]
    work = {"uncoded": 1.0, "hedge": 1.05, "coded": 1.1}.get(policy, 2.0)
    figures = {"p999_ms": late, "p999_ms_95": interval, "work_per_query": work}
    return {**place, **figures, "decoded_share": 0.0, "settings": {"scenario": {}}}


def test_what_the_runs_of_a_place_cannot_be_trusted_for() -> None:
    def run(policy: str, stragglers: str, qps: float, drifting: bool = False) -> dict[str, Any]:
        cause = [{"kind": "hang", "probability": 0.001}] if stragglers == "hung" else []
        given = {"queries": 2000, "arrivals": {"qps": qps}, "service": 10, "policy": "uncoded"}
        settings = {"scenario": given | {"stragglers": cause, "hang_timeout_ms": 900}}
        more = {"settings": settings, "drifting": drifting}
        return row(0.2, policy, 50.0, stragglers=stragglers) | more

    policies = ("uncoded", "hedge")
    rows = [run(policy, "hung", 500) for policy in policies]  # for 4 s, with a hang each 2 s
    rows += [run(policy, "none", 500, policy == "hedge") for policy in policies]
    rows += [run(policy, "held", 5000) for policy in policies]
    rows += [run("hedge", "slower", 500, True), run("hedge", "slower", 500)]  # simulated again
    short, drifts, over = warnings_of(rows)
    assert short.startswith("hung, 1, 20%: The run lasts 4.0 s, and the rarest event (hang) comes")
    assert short.endswith("longer.")
    assert drifts.startswith("none, 1, 20%: Requests seem to wait ever longer")
    assert drifts.endswith("(hedge)")
    assert over.startswith("held, 1, 20%: Overloaded")


def test_rows_are_kept_and_the_rest_is_simulated(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = run_sweep(SWEEP, out)
    assert len(rows) == 16
    assert read_rows(out) == rows
    assert all(row["commit"] and row["machine"] and row["began"] for row in rows)
    for row in rows:
        given = row["settings"]["scenario"]
        assert given["arrivals"]["qps"] == pytest.approx(row["load"] * 600)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:10]) + "\n" + lines[10][:50])  # and one that was being written
    again = run_sweep(SWEEP, out)
    assert [(r["key"], r["p999_ms"]) for r in again] == [(r["key"], r["p999_ms"]) for r in rows]
    assert out.read_text().splitlines()[:10] == lines[:10]
    wider = SWEEP.model_copy(update={"loads": (0.2, 0.5, 0.7)})
    assert [row["load"] for row in run_sweep(wider, out, ["load=0.7", "batch=4"])] == [0.7] * 4
    assert len(run_sweep(wider, out)) == len(read_rows(out)) == 24


@pytest.mark.parametrize("name", ["two-losses", "auto"])
def test_shipped_rows_are_of_the_scenarios_that_their_sweep_has(name: str) -> None:
    """Draws and stragglers included: what is simulated today can be compared with them."""
    root = Path(__file__).parents[2]
    sweep = Sweep.model_validate(read_json(root / "configs" / "bench" / f"simulate-{name}.json"))
    rows = read_rows(root / "docs" / "results" / f"{name}.jsonl")
    kept = {Point.of(row): row["settings"]["scenario"] for row in rows}
    for cell, found in sweep.scenarios():
        assert parse_scenario(kept[cell], "row") == found, cell


def test_a_method_of_ones_own_whose_file_changed_is_simulated_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, out = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    text = (Path(__file__).parents[2] / "examples" / "my_method.py").read_text()
    for changed, rows in (("", 2), ("", 2), ("# otherwise", 3)):
        own.write_text(text + changed)
        monkeypatch.setattr(registry, "_found", {})  # each is a process of its own
        base = scenario(workers=8, k=4, queries=300)
        policies = ("uncoded", f"{own}:TwoParities")
        sweep = Sweep(base=base, loads=(0.2,), policies=policies, stragglers=("none",))
        assert len(run_sweep(sweep, out)) == 2
        assert len(read_rows(out)) == rows


def test_a_cell_that_fails_is_a_row_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"

    def breaks(given: Any) -> dict[str, Any]:
        if given.policy == "coded" and given.arrivals.batch == 4 and given.stragglers:
            raise RuntimeError("out of luck")
        return simulate(given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "simulate", breaks)
        with pytest.raises(UserError, match="2 of the runs failed"):
            run_sweep(SWEEP, out)
    assert len(run_sweep(SWEEP, out)) == 16
    assert len(read_rows(out)) == 18


def test_cells_have_as_many_requests_as_was_asked_for() -> None:
    wide = SWEEP.model_copy(update={"requests": 200})
    found = {cell.batch: given.queries for cell, given in wide.scenarios()}
    assert found == {1: 300, 4: 800}


def test_variants_change_the_base() -> None:
    raw = SWEEP.model_dump() | {"variants": {"12 workers": {"workers": 12}, "as it is": {}}}
    found = dict(Sweep.model_validate(raw).scenarios())
    assert len(found) == 2 * len(list(SWEEP.scenarios()))
    seeds = set()
    for cell, given in found.items():
        model, variant = cell.stragglers.split(", ")
        assert model in SWEEP.stragglers
        assert given.workers == (12 if variant == "12 workers" else 6)
        assert given.arrivals.qps == pytest.approx(cell.load * given.workers * 100)
        seeds.add(given.seed)
    assert len(seeds) == len({cell[:3] for cell in found})
    with pytest.raises(UserError, match="unknown key 'wokers'"):
        list(Sweep.model_validate(raw | {"variants": {"": {"wokers": 1}}}).scenarios())


def test_the_command_line(tmp_path: Path, call_benchmarks: Command) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "rows.jsonl"
    base = {**SWEEP.base.model_dump(mode="json"), "queries": 600, "arrivals": {"qps": 300}}
    sweep = {"base": base, "loads": [0.3, 0.6], "stragglers": ["none", "hung"]}
    path.write_text(json.dumps({**sweep, "policies": ["uncoded", "coded", "hedge"]}))
    outcome = call_benchmarks("sweep", path, "--out", out)
    assert outcome.code == 0, outcome.err
    assert len(read_rows(out)) == 12
    assert "hung, 1, 30%: The run lasts" in outcome.out
    assert call_benchmarks("sweep", path, "--out", out, "--only", "load=0.5").code == 2
    path.write_text('{"base": {}, "load": [0.5]}')
    outcome = call_benchmarks("sweep", path, "--out", out)
    assert "unknown key 'load': did you mean 'loads'" in outcome.err


def test_the_table_of_members_says_from_when_alone_is_better(tmp_path: Path) -> None:
    late = {"one": 11, "alone": 30, "0.1 ms": 12, "2 ms": 29, "5 ms": 31, "10 ms": 40}
    for fault, factor in (("none", 1.0), ("pareto", 0.5)):
        for way, p99 in late.items():
            figures = {"p50_ms": 10.0, "p999_ms": 50.0}
            figures["p99_ms"] = p99 * (1.0 if way == "alone" else factor)
            place = Point(f"{fault}, 4 before 8: {way}", 1, 0.4, "hedge")._asdict()
            append_row(tmp_path / "rows", Cell(KIND, place, {}, partial(dict, figures)).row())
    none, pareto = members(tmp_path / "rows").strip().splitlines()[2:]
    assert none.startswith("| 4, 8 | none, 40% | 10 / 11 / 50 | 10 / 30 / 50 |")
    assert none.endswith("| 5 ms |")
    assert pareto.endswith("| none of these |")
