"""How well auto chooses, from rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.choosing import beside_hedge, choosing


def row(policy: str, late: float | None, stragglers: str = "held", **more: Any) -> dict[str, Any]:
    cell = {"stragglers": stragglers, "batch": 10, "load": 0.5, "policy": policy}
    figures = {"p50_ms": 50.0, "p99_ms": 90.0, "p999_ms": late, "p999_ms_95": None}
    figures |= {"work_per_query": 1.0, "decoded_share": 0.0, "drifting": False}
    given = {"arrivals": {"qps": 10}, "service": 42, "policy": "uncoded"}
    return {"schema_version": 1, "cell": cell, "scenario": given, **figures, **more}


ROWS = [
    row("uncoded", 200.0),
    row("hedge", 100.0),
    row("small-backup", 221.0, work_per_query=1.1),
    row("auto", 109.0),
    row("auto+none", 111.0),
    row("uncoded", 50.0, "none"),
    row("hedge", 52.0, "none"),
    row("small-backup", 50.0, "none", work_per_query=1.08),
    row("auto", 60.0, "none", p99_ms=92.7, work_per_query=1.01),
    row("auto+none", 50.0, "none"),
]


def section(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "auto.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return choosing(path)


def test_policies_beside_the_lowest_fixed_one(tmp_path: Path) -> None:
    found = section(tmp_path, ROWS)
    lines = {line.split("|")[1].strip(): line for line in found.splitlines() if line[:1] == "|"}
    assert lines["auto"] == ("| auto | 1 of 2 | 1.20 (none, 10, 50%) | 1 | 1.00 to 1.01 |")
    assert lines["small-backup"] == (
        "| small-backup | 1 of 2 | 2.21 (held, 10, 50%) | 1 | 1.08 to 1.10 |"
    )
    assert lines["hedge"].startswith("| hedge | 2 of 2 | 1.04")
    assert "1 of 2; farthest: 1.11 (held, 10, 50%)" in found
    assert "in 1 places at most: p50 1.000, p99 1.030, work 1.010" in found


def test_places_that_say_nothing_are_left_out_or_named(tmp_path: Path) -> None:
    hung = [row("uncoded", 3000.0, "hung"), row("hedge", 100.0, "hung")]
    found = section(tmp_path, [*ROWS, *hung])
    assert found == section(tmp_path, ROWS)
    assert "too short" not in found
    burst = {"kind": "burst", "factor": 5, "workers": 3, "every_s": 1e6, "delay": 840}
    short = [{**one, "scenario": {**one["scenario"], "stragglers": [burst]}} for one in ROWS]
    last = section(tmp_path, short).splitlines()[-1]
    assert last.startswith("- none, 10, 50%: The run lasts 10000.0 s, and the rarest event (burst)")


def test_auto_is_compared_with_a_hedge_by_load(tmp_path: Path) -> None:
    def at(load: float, stragglers: str, hedge: float, auto: float) -> list[dict[str, Any]]:
        rows = [row("hedge", hedge, stragglers), row("auto", auto, stragglers)]
        return [{**one, "cell": {**one["cell"], "load": load}} for one in rows]

    rows = [*at(0.3, "held", 100.0, 40.0), *at(0.3, "pareto", 100.0, 90.0)]
    rows += [*at(0.3, "none", 50.0, 51.0), *at(0.8, "held", 200.0, 190.0)]
    path = tmp_path / "auto.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    _, _, *lines = beside_hedge(path).strip().splitlines()
    assert lines == [
        "| held | 10 | 0.40 | 0.95 |",
        "| none | 10 | 1.02 |  |",
        "| pareto | 10 | 0.90 |  |",
        "| mean of held, pareto | 10 | 0.60 (0.40 to 0.90) | 0.95 (0.95 to 0.95) |",
    ]
    more = at(0.3, "hung", 100.0, 10.0)  # a coin toss
    path.write_text("".join(json.dumps(one) + "\n" for one in [*rows, *more]))
    assert beside_hedge(path).strip().splitlines()[2:] == lines
    path.write_text(json.dumps(row("hedge", 100.0)) + "\n")
    assert beside_hedge(path) == ""


def test_coding_is_compared_with_what_it_competes_with(tmp_path: Path) -> None:
    found = section(tmp_path, [*ROWS, row("coded", 90.0), row("coded", 55.0, "none")])
    assert "`coded` is lower than each of `hedge`, `small-backup` in 1 of 2; 0.900 times" in found
    hedged = [row("coded+hedge", 95.0), row("coded+hedge", 51.0, "none")]
    both = [row("small-backup+hedge", 97.0), row("small-backup+hedge", 51.0, "none")]
    found = section(tmp_path, [*ROWS, *hedged, *both])
    assert "`small-backup+hedge` in 1 of 2; 0.979 times" in found


def test_places_where_all_are_lost_and_rows_without_auto(tmp_path: Path) -> None:
    found = section(tmp_path, [row("uncoded", None), row("hedge", None)])
    assert "| hedge | 1 of 1 | 1.00" in found
    assert "auto" not in found


@pytest.mark.parametrize("late", [None, 500.0])
def test_a_policy_that_loses_is_far(tmp_path: Path, late: float | None) -> None:
    found = section(tmp_path, [row("uncoded", 100.0), row("hedge", late)])
    assert f"| hedge | 0 of 1 | {'inf' if late is None else '5.00'}" in found
