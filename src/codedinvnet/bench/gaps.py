"""Trials of a grid that have no finished row, so that a table's blanks can be told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from codedinvnet.bench.grid import AccuracyGrid, Trial, trials
from codedinvnet.rows import Row

ABSENT = "not measured"
"""A table's cell for it."""
PLACE = ("label", "method", "dataset", "base", "k", "missing", "corrupt")
"""What tells one trial of a grid from another, but for the seed."""


def _place(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(values[name] for name in PLACE)


def gaps(grid: AccuracyGrid, rows: Sequence[Row]) -> list[Trial]:
    """Return the trials of a grid that have no finished row.

    Data sets with quick rows are left out, and all, if there are no other rows: the quick version
    does not do every trial.

    Args:
        grid: what was to be measured.
        rows: what was, without those that are out of date.
    """
    quick = {row["dataset"] for row in rows if row["settings"]["quick"]}
    if quick >= {row["dataset"] for row in rows}:
        return []
    done = {(_place(row), row["seed"]) for row in rows if row["error"] is None}
    return [
        trial
        for trial in trials(grid)
        if trial.dataset not in quick and (_place(trial.as_dict()), trial.seed) not in done
    ]


@dataclass(frozen=True)
class _Gap:
    """Trials without a row that one part of a sentence names."""

    label: str
    datasets: tuple[str, ...]
    bases: tuple[str, ...]
    """() if the grid has the method on one base model alone."""
    k: tuple[int, ...]
    missing: tuple[int, ...]
    corrupt: tuple[int, ...]
    seeds: tuple[int, ...]
    """() if no seed was measured."""

    def __str__(self) -> str:
        text = f"{_listed(self.datasets)} k = {_listed(self.k)}"
        lost = [
            f"{_listed(counts)} {what}"
            for what, counts, usual in (
                ("missing", self.missing, (1,)),
                ("corrupt", self.corrupt, (0,)),
            )
            if counts != usual
        ]
        text += f" with {' and '.join(lost)}" if lost else ""
        more = [_listed(self.bases)] if self.bases else []
        if self.seeds:
            more.append(f"seed{'s' if len(self.seeds) > 1 else ''} {_listed(self.seeds)}")
        return text + (f" ({'; '.join(more)})" if more else "")


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _merged(found: Iterable[_Gap], field: str) -> list[_Gap]:
    """Return gaps that differ in one field alone as one."""

    def with_field(gap: _Gap, values: Any) -> _Gap:
        return replace(gap, **{field: values})

    values: dict[_Gap, tuple[Any, ...]] = {}
    for gap in found:
        rest = with_field(gap, ())
        values[rest] = (*values.get(rest, ()), *getattr(gap, field))
    return [with_field(rest, own) for rest, own in values.items()]


def describe_gaps(grid: AccuracyGrid, rows: Sequence[Row]) -> str:
    """Return a paragraph that names the trials of a grid without a row; "" if all have one.

    Trials that failed are not among them: they have a table of their own.

    Args:
        grid: what was to be measured.
        rows: what was, without those that are out of date.
    """
    failed = {(_place(row), row["seed"]) for row in rows if row["error"] is not None}
    lacking = [
        trial for trial in gaps(grid, rows) if (_place(trial.as_dict()), trial.seed) not in failed
    ]
    done = {_place(row) for row in rows if row["error"] is None}
    touched = {row["dataset"] for row in rows if row["error"] is None}
    bases: dict[str, set[str]] = {}
    for trial in trials(grid):
        bases.setdefault(trial.label, set()).add(trial.base)
    seeds: dict[tuple[Any, ...], dict[int, Trial]] = {}
    for trial in lacking:
        if trial.dataset in touched:
            seeds.setdefault(_place(trial.as_dict()), {})[trial.seed] = trial
    found = []
    for place, own in seeds.items():
        trial = next(iter(own.values()))
        found.append(
            _Gap(
                label=trial.label,
                datasets=(trial.dataset,),
                bases=(trial.base,) if len(bases[trial.label]) > 1 else (),
                k=(trial.k,),
                missing=(trial.missing,),
                corrupt=(trial.corrupt,),
                seeds=tuple(own) if place in done else (),
            )
        )
    for field in ("k", "bases", "missing", "corrupt", "datasets"):
        found = _merged(found, field)
    whole = dict.fromkeys(trial.dataset for trial in lacking if trial.dataset not in touched)
    text = [f"all of {_listed(whole)}."] if whole else []
    for label in dict.fromkeys(gap.label for gap in found):
        text.append(f"{label}: {'; '.join(str(gap) for gap in found if gap.label == label)}.")
    return f"Not measured: {' '.join(text)}" if text else ""
