"""The rows of `bench accuracy` that ship are of today's grid and bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codedinvnet.common.grid import read_rows
from codedinvnet.evaluation.trials import GRID, AccuracyGrid, Trial, load_grid, trials
from codedinvnet.models.bundle import shipped_bundles, weights_digest

ROOT = Path(__file__).parents[2]
PLACE = ("label", "dataset", "base", "k", "missing", "seed")


def differs(row: Any, today: Any) -> bool:
    """Return whether settings differ; one that is gone must have been off."""
    if not (isinstance(row, Mapping) and isinstance(today, Mapping)):
        return bool(row != today)
    gone = [row[name] for name in {*row} - {*today}]
    return any(gone) or any(differs(row.get(name), today[name]) for name in today)


def is_of(row: Mapping[str, Any], grid: AccuracyGrid, trial: Trial) -> bool:
    """Return whether a row is of a trial, as far as settings tell: images may not be here."""
    settings = row["settings"]
    if (settings["groupings"], settings["patterns"]) != (trial.groupings, trial.patterns):
        return False
    shipped = trial.dataset in shipped_bundles() and "bundle" in settings
    if shipped and settings["bundle"] != weights_digest(trial.dataset):
        return False
    own = grid.datasets[trial.dataset]
    parts = [part for part in ("classifier", *own.budgets) if part in settings]
    return not any(
        differs(settings[part], own.budget(part).model_dump(mode="json")) for part in parts
    )


def test_each_row_is_one_that_the_grid_produces_today() -> None:
    grid = load_grid(GRID)
    planned = {tuple(trial.place[each] for each in PLACE): trial for trial in trials(grid)}
    wrong = set()
    for row in read_rows(ROOT / "docs" / "results" / "accuracy.jsonl", "accuracy"):
        place = tuple(row[each] for each in PLACE)
        if place not in planned or not is_of(row, grid, planned[place]):
            wrong.add(place)
    assert not wrong
