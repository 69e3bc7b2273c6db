from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.bench import tables
from codedinvnet.bench.gaps import describe_gaps, gaps
from codedinvnet.bench.grid import AccuracyGrid, load_grid, trials
from tests.bench.canned import row

PART = {"epochs": 1, "steps_per_epoch": 3}
BLOCKS: list[dict[str, Any]] = [
    {"methods": ["none"], "k": [4, 10]},
    {"methods": ["parm"], "bases": ["invertible", "resnet"], "k": [2, 4]},
    {"methods": ["small-backup"], "k": [10], "missing": [1, 2, 3], "seeds": [1, 2, 3]},
    {"methods": ["approxifer"], "k": [4], "corrupt": [0, 1]},
]


@pytest.fixture
def grid(tmp_path: Path) -> AccuracyGrid:
    data = {"classifier": PART, "backup": PART, "parity": PART}
    datasets = {name: {"bundle": name, **data} for name in ("mnist", "fashion")}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"name": "tiny", "datasets": datasets, "blocks": BLOCKS}))
    return load_grid(path)


def measured(grid: AccuracyGrid) -> list[dict[str, Any]]:
    """A row for every trial."""
    names = ("dataset", "base", "k", "missing", "corrupt", "seed")
    return [
        row(trial.label, 0.5, **{name: getattr(trial, name) for name in names})
        for trial in trials(grid)
    ]


def without(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [one for one in rows if any(one[name] != value for name, value in values.items())]


def test_a_grid_that_was_done_has_no_gaps(grid: AccuracyGrid) -> None:
    rows = measured(grid)
    assert gaps(grid, rows) == []
    assert describe_gaps(grid, rows) == ""
    assert "Not measured" not in tables.report(rows, grid)


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ({"label": "none", "k": 10, "dataset": "mnist"}, "none: mnist k = 10."),
        ({"label": "none", "k": 10}, "none: mnist, fashion k = 10."),
        ({"label": "none", "dataset": "mnist"}, "none: mnist k = 4, 10."),
        ({"label": "parm", "dataset": "fashion"}, "parm: fashion k = 2, 4 (invertible, resnet)."),
        ({"label": "parm", "base": "resnet"}, "parm: mnist, fashion k = 2, 4 (resnet)."),
        (
            {"label": "small-backup", "missing": 1, "dataset": "mnist"},
            "small-backup: mnist k = 10.",
        ),
        (
            {"label": "small-backup", "dataset": "mnist", "missing": 2, "seed": 3},
            "small-backup: mnist k = 10 with 2 missing (seed 3).",
        ),
        ({"label": "approxifer", "corrupt": 1}, "approxifer: mnist, fashion k = 4 with 1 corrupt."),
        ({"dataset": "fashion"}, "all of fashion."),
    ],
)
def test_what_has_no_row_is_named_in_groups(
    grid: AccuracyGrid, lacking: dict[str, Any], told: str
) -> None:
    rows = without(measured(grid), **lacking)
    assert describe_gaps(grid, rows) == f"Not measured: {told}"
    paragraphs = tables.report(rows, grid).split("\n\n")
    assert f"Not measured: {told}" in paragraphs
    assert "Not measured" not in tables.report(rows)


def test_several_gaps_of_a_method_stand_together(grid: AccuracyGrid) -> None:
    rows = measured(grid)
    for gone in (
        {"label": "parm", "dataset": "fashion", "k": 2},
        {"label": "parm", "dataset": "mnist", "k": 4, "base": "resnet"},
        {"label": "small-backup", "dataset": "mnist", "missing": 2},
        {"label": "small-backup", "dataset": "mnist", "missing": 3},
        {"label": "small-backup", "dataset": "mnist", "missing": 1, "seed": 2},
        {"label": "small-backup", "dataset": "mnist", "missing": 1, "seed": 3},
    ):
        rows = without(rows, **gone)
    assert describe_gaps(grid, rows) == (
        "Not measured: parm: mnist k = 4 (resnet); fashion k = 2 (invertible, resnet). "
        "small-backup: mnist k = 10 with 2, 3 missing; mnist k = 10 (seeds 2, 3)."
    )


def test_a_failed_trial_is_not_measured(grid: AccuracyGrid) -> None:
    rows = without(measured(grid), label="none", k=10, dataset="mnist")
    rows.append(row("none", 0.0, error="RuntimeError: out of luck"))
    assert [trial.name() for trial in gaps(grid, rows)] == [
        "none on mnist (invertible), k = 10, 1 missing, seed 1"
    ]


def test_rows_that_are_out_of_date_measure_nothing(grid: AccuracyGrid) -> None:
    rows = measured(grid)
    rows.append(row("none", 0.5, grouping_seed=1))
    assert "| none |" in tables.report(rows, grid)
    assert "parm: mnist k = 2, 4 (invertible, resnet)." in tables.report(rows, grid)


def test_the_quick_version_leaves_trials_out_and_does_not_say_so(grid: AccuracyGrid) -> None:
    quick = [row("none", 0.1, quick=True, dataset="fashion")]
    assert gaps(grid, quick) == []
    full = without(measured(grid), dataset="fashion")
    assert gaps(grid, [*full, *quick]) == []
    assert describe_gaps(grid, full) == "Not measured: all of fashion."
