from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.simulation.figures import FEWEST_SECTIONS, QUANTILES, sections_for
from codedinvnet.simulation.picture import draw_map
from codedinvnet.simulation.sweep import (
    NOBODY,
    Sweep,
    contested,
    helps_up_to,
    parse_sweep,
    read_rows,
    run_sweep,
    winners,
)
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
    return {"cell": place, **figures, "scenario": {}}


ROWS = [
    row(0.2, "uncoded", 100.0),
    row(0.5, "uncoded", 110.0),
    row(0.8, "uncoded", 200.0),
    row(0.2, "coded", 30.0),
    row(0.5, "coded", 120.0),
    row(0.8, "coded", 150.0),
    row(0.2, "hedge", 40.0),
    row(0.5, "hedge", 50.0),
    row(0.8, "hedge", None),
    row(0.2, "replicate", 300.0),
]


def test_where_intervals_overlap_the_winner_is_one_of_several() -> None:
    assert contested(ROWS) == (0, 3)
    assert contested([*ROWS, row(0.2, "replicate", 32.0)]) == (1, 3)
    assert contested([row(0.2, "uncoded", None), row(0.2, "coded", None)]) == (0, 0)


def test_rows_are_kept_and_the_rest_is_simulated(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = run_sweep(SWEEP, out, {"commit": "abc"})
    assert len(rows) == 16
    assert read_rows(out) == rows
    assert all(r["commit"] == "abc" and "time" in r for r in rows)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:10]) + "\n")
    assert [json.dumps(r["cell"]) for r in run_sweep(SWEEP, out, {})] == [
        json.dumps(r["cell"]) for r in rows
    ]
    assert out.read_text().splitlines()[:10] == lines[:10]
    assert len(read_rows(out)) == 16
    wider = SWEEP.model_copy(update={"loads": (0.2, 0.5, 0.7)})
    assert len(run_sweep(wider, out, {})) == 24
    assert len(read_rows(out)) == 24


def test_a_sweep_that_was_interrupted_in_a_line_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = run_sweep(SWEEP, out, {})
    whole = out.read_bytes()
    out.write_bytes(whole[: -len(json.dumps(rows[-1])) // 2])
    again = run_sweep(SWEEP, out, {})
    assert [r["p999_ms"] for r in again] == [r["p999_ms"] for r in rows]
    assert len(read_rows(out)) == 16
    assert read_rows(tmp_path / "nothing") == []


def test_cells_have_as_many_requests_as_was_asked_for() -> None:
    wide = SWEEP.model_copy(update={"requests": 200})
    found = {cell.batch: given.queries for cell, given in wide.scenarios()}
    assert found == {1: 300, 4: 800}


def test_every_percentile_of_the_shipped_map_has_an_interval() -> None:
    path = Path(__file__).resolve().parents[2] / "configs/bench/simulate-map.json"
    shipped = parse_sweep(read_json(path), path)
    assert shipped is not None
    for cell, given in shipped.scenarios():
        requests = given.queries // cell.batch
        counted = requests - int(given.warmup * requests)
        assert sections_for(counted, QUANTILES["p999"]) >= FEWEST_SECTIONS


def test_a_row_tells_the_load() -> None:
    for cell, given in SWEEP.scenarios():
        assert given.arrivals.qps == pytest.approx(cell.load * 600)  # six workers, 10 ms
        assert (given.policy, given.arrivals.batch) == (cell.policy, cell.batch)
        assert bool(given.stragglers) == (cell.stragglers == "held")


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


def test_the_small_backup_is_a_code_of_its_own(tmp_path: Path) -> None:
    raw = SWEEP.model_dump() | {"policies": ["coded", "small-backup"], "loads": [0.2]}
    sweep = Sweep.model_validate(raw)
    found = {cell.policy: (given.policy, given.method) for cell, given in sweep.scenarios()}
    assert found == {"coded": ("coded", "coded-invnet"), "small-backup": ("coded", "small-backup")}
    rows = run_sweep(sweep, tmp_path / "rows.jsonl", {})
    assert {row["cell"]["policy"] for row in rows if "accuracy" in row} == {"coded"}
    draw_map(rows, tmp_path / "map.png")
    with pytest.raises(ValueError, match="'backup' is not one of uncoded"):
        Sweep.model_validate(raw | {"policies": ["backup"]})


def test_who_wins_and_how_far_each_helps() -> None:
    assert winners(ROWS) == {
        ("held", 1, 0.2): "coded",
        ("held", 1, 0.5): "hedge",
        ("held", 1, 0.8): "coded",
    }
    assert helps_up_to(ROWS) == {
        ("held", 1, "coded"): 0.2,  # at 0.5 it does harm
        ("held", 1, "hedge"): 0.5,
        ("held", 1, "replicate"): None,
    }


def test_a_few_percent_are_no_win() -> None:
    rows = [row(0.2, "uncoded", 100.0), row(0.2, "coded", 97.0), row(0.2, "hedge", 104.0)]
    assert list(winners(rows).values()) == ["uncoded"]
    assert set(helps_up_to(rows).values()) == {None}
    never = [row(0.2, "uncoded", None), row(0.2, "coded", None), row(0.2, "hedge", None)]
    assert list(winners(never).values()) == [NOBODY]
    assert set(helps_up_to(never).values()) == {None}


def test_the_map_is_drawn_from_rows(tmp_path: Path) -> None:
    rows = [*ROWS, row(0.2, "coded+hedge", 20.0, stragglers="none", batch=10)]
    rows.append(row(0.8, "coded+hedge", None, stragglers="none", batch=10))  # where nobody wins
    path = tmp_path / "pictures" / "map.png"
    draw_map(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    draw_map([{**r, "p999_ms": 50.0} for r in rows], path)
    assert path.read_bytes() != first


def test_files_that_hold_no_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text('{"base": {}, "load": [0.5]}')
    with pytest.raises(UserError, match="unknown key 'load': did you mean 'loads'"):
        parse_sweep(read_json(path), path)
    path.write_text('{"arrivals": {}}')
    assert parse_sweep(read_json(path), path) is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"schema_version": 1, "kind": "latency"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, line 1 is no row of a sweep"):
        read_rows(rows)
    rows.write_text("{\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_rows(rows)
