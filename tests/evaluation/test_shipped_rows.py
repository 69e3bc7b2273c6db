"""The rows of `bench accuracy` that ship are of today's grids and bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codedinvnet.common.grid import read_rows
from codedinvnet.evaluation.trials import GRID, AccuracyGrid, Trial, load_grid, trials
from codedinvnet.models.bundle import shipped_bundles, weights_digest

ROOT = Path(__file__).parents[2]
NAMES = (
    "backup-long",
    "equal-cost",
    "equal-cost-long",
    "tiny-imagenet",
    "tiny-imagenet-equal-cost",
)
GRIDS = (GRID, *(ROOT / "configs" / "bench" / f"{name}.json" for name in NAMES))
PLACE = ("label", "dataset", "base", "k", "missing", "seed")
KNOWN = {("parm", "cifar10", "invertible", 10)}
"""Rows that were measured with other settings, as the page says, and are still to be made again."""


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


def planned() -> Iterator[tuple[AccuracyGrid, Trial]]:
    for path in GRIDS:
        grid = load_grid(path)
        yield from ((grid, trial) for trial in trials(grid))


def test_each_row_is_one_that_a_grid_produces_today() -> None:
    newest = {}
    for name in ("accuracy", "equal-cost"):
        for row in read_rows(ROOT / "docs" / "results" / f"{name}.jsonl", "accuracy"):
            if row["error"] is None:
                newest[name, *(row[each] for each in PLACE)] = row
    of_place: dict[tuple[Any, ...], list[tuple[AccuracyGrid, Trial]]] = {}
    for grid, trial in planned():
        of_place.setdefault(tuple(trial.place[each] for each in PLACE), []).append((grid, trial))
    wrong = {
        (row["label"], row["dataset"], row["base"], row["k"])
        for place, row in newest.items()
        if not any(is_of(row, *made) for made in of_place.get(place[1:], ()))
    }
    assert wrong == KNOWN
