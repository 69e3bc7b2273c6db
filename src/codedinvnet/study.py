"""The runner of every grid: what is not done yet is measured, a row each, and kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codedinvnet.errors import UserError
from codedinvnet.progress import Progress
from codedinvnet.rows import Row, append_row, measured_row


@dataclass(frozen=True)
class Job:
    """One row to measure.

    Attributes:
        name: the job in words.
        header: what the row says before it is measured; its `key` tells it from all others.
        measure: returns the figures.
        weight: about how long it takes, compared with the others.
    """

    name: str
    header: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    weight: float = 1.0


def finished(row: Row | None) -> bool:
    """Return whether there is a row, and it has no error."""
    return row is not None and row.get("error") is None


def run(jobs: Iterable[Job], out: Path, what: str) -> dict[str, int]:
    """Measure jobs one after another, each a row that is appended when it is known.

    A job that raises becomes a row with its error, and lets the others go on.

    Args:
        jobs: those to do.
        out: the rows.
        what: is measured, for the progress bar.

    Returns:
        How many were done, and how many failed.
    """
    todo = list(jobs)
    counts = {"done": 0, "failed": 0}
    form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}"
    whole = sum(job.weight for job in todo)
    with Progress(
        total=whole, desc=f"{what}, {len(todo)}", bar_format=form, dynamic_ncols=True
    ) as bar:
        for job in todo:
            bar.set_postfix_str(job.name, refresh=True)
            row = measured_row(job.header, job.measure)
            append_row(out, row)
            counts["failed" if row["error"] else "done"] += 1
            if row["error"]:
                bar.write(f"failed: {job.name}: {row['error']}", file=sys.stderr)
            bar.update(job.weight)
    return counts


def refuse_failures(failed: int, what: str, rows: Path) -> None:
    """Raise UserError if trials failed, so that scripts notice."""
    if failed:
        raise UserError(
            f"{failed} {what} failed; the errors are in {rows}, and the same command tries again"
        )
