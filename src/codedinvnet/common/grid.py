"""One experiment grid: its cells, the rows that measuring leaves, and what is left to do.

A row is one JSON object a line, appended as soon as its cell is measured. It holds the cell's place
(such as method, data set and seed) and figures side by side, and the settings that the figures
depend on with their digest, the row's `version`. Rows of different versions are never mixed in one
line of a table: `latest` keeps those of the newest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from codedinvnet.common.errors import UserError
from codedinvnet.common.files import parse_json
from codedinvnet.common.progress import Progress
from codedinvnet.common.provenance import describe_commit, describe_machine

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA_VERSION = 2
Row: TypeAlias = dict[str, Any]
T = TypeVar("T")


def key_of(*parts: Any) -> str:
    """Return a short digest of JSON values."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(*parts: Any) -> int:
    """Return a seed below 2³¹ for JSON values, so that each combination has draws of its own."""
    return zlib.crc32(json.dumps(parts).encode()) // 2


@dataclass(frozen=True)
class Cell:
    """One point of a grid.

    Attributes:
        experiment: the kind of its rows, such as "accuracy".
        place: the coordinates in the grid, which become columns.
        settings: all else that the figures depend on.
        measure: returns the figures.
        name: the cell in words.
        weight: about how long it takes, relative to the others.
    """

    experiment: str
    place: Mapping[str, Any]
    settings: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    name: str = ""
    weight: float = 1.0

    @property
    def key(self) -> str:
        """The digest of place and settings; a row with this key is this cell's."""
        return key_of(self.experiment, dict(self.place), dict(self.settings))

    def row(self) -> Row:
        """Measure, and return the row; an exception becomes the row's `error`."""
        row: Row = {
            "schema_version": SCHEMA_VERSION,
            "experiment": self.experiment,
            **self.place,
            "settings": dict(self.settings),
            "version": key_of(dict(self.settings)),
            "key": self.key,
            "commit": describe_commit(),
            "machine": describe_machine(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        began, error = time.monotonic(), None
        try:
            row = {**row, **self.measure(), **row}  # figures replace no field of the header
        except Exception as caught:
            if not isinstance(caught, UserError):  # a method's own mistake, perhaps
                traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}"
        return {**row, "seconds": round(time.monotonic() - began, 1), "error": error}


def expand(**axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the axes' values, the last axis varying fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def select(
    found: Sequence[T], only: Iterable[str], place: Callable[[T], Mapping[str, Any]]
) -> list[T]:
    """Return the items that fit words like `k=10`: any of a key's values, and every key."""
    wanted: dict[str, list[Any]] = {}
    places = [place(one) for one in found]
    for word in only:
        key, equals, text = word.partition("=")
        values = list(dict.fromkeys(at[key] for at in places if key in at))
        if not equals or not values:
            keys = ", ".join(dict.fromkeys(key for at in places for key in at))
            raise UserError(f"--only: {word!r} is not KEY=VALUE with a KEY of {keys}")
        matches = [value for value in values if str(value) == text]
        if not matches:
            known = ", ".join(map(str, values))
            raise UserError(f"--only: the grid has no {word}; its values of {key}: {known}")
        wanted.setdefault(key, []).extend(matches)
    return [
        one
        for one, at in zip(found, places, strict=True)
        if all(at.get(key) in values for key, values in wanted.items())
    ]


def resume(cells: Iterable[Cell], out: Path) -> dict[str, int]:
    """Measure the cells that have no finished row in a file yet, and append their rows.

    A cell that raises gets a row with its error, and the next call tries it again.

    Returns:
        How many rows were done, kept and failed.
    """
    wanted = {cell.key: cell for cell in cells}
    done: set[str] = set()
    for experiment in dict.fromkeys(cell.experiment for cell in wanted.values()):
        done |= {row["key"] for row in read_rows(out, experiment) if row["error"] is None}
    todo = [cell for key, cell in wanted.items() if key not in done]
    counts = {"done": 0, "kept": len(wanted) - len(todo), "failed": 0}
    with Progress(
        total=sum(cell.weight for cell in todo),
        desc=f"{len(todo)} to measure",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}",
        dynamic_ncols=True,
    ) as bar:
        for cell in todo:
            bar.set_postfix_str(cell.name, refresh=True)
            row = cell.row()
            append_row(out, row)
            counts["failed" if row["error"] else "done"] += 1
            if row["error"]:
                bar.write(f"failed: {cell.name}: {row['error']}", file=sys.stderr)
            bar.update(cell.weight)
    return counts


def refuse_failures(failed: int, what: str, rows: Path) -> None:
    """Raise UserError if cells failed, so that scripts notice."""
    if failed:
        raise UserError(
            f"{failed} {what} failed; the errors are in {rows}, and the same command tries again"
        )


# Files of rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, in place of a line that an interrupted writer left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = _whole_lines(path)
    with open(path, "ab") as file:
        file.truncate(len(whole))
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(path: Path) -> bytes:
    """Return a file's finished lines; refuse a file of something else."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.startswith(b"{"):
        raise UserError(f"{path} does not hold rows: name another file, or move this one away")
    return content[: content.rfind(b"\n") + 1]


def read_rows(path: Path, experiment: str | None = None) -> list[Row]:
    """Return the rows of a file, oldest first; [] if there is none.

    An unfinished last line is ignored.

    Args:
        path: the file.
        experiment: the only kind of rows that it may hold; None: any.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        version = row.get("schema_version") if isinstance(row, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(f"{where}: schema version {version}; expected {SCHEMA_VERSION}")
        if experiment not in (None, row["experiment"]):
            raise UserError(f"{where}: a row of {row['experiment']!r}, not of {experiment!r}")
        rows.append(row)
    return rows


def latest(
    rows: Iterable[Mapping[str, Any]], place: Sequence[str], repeated: Sequence[str] = ()
) -> DataFrame:
    """Return a frame of the newest finished row of each place.

    Places that differ only in what is `repeated` (seeds, runs) make one line of a table, so only
    those of the line's newest version are kept.

    Args:
        rows: oldest first.
        place: the names of the coordinates.
        repeated: those of them that number repetitions.
    """
    from pandas import DataFrame

    finished = [row for row in rows if row["error"] is None]
    frame = DataFrame(finished, columns=None if finished else [*place, "version", "settings"])
    frame = frame.drop_duplicates(list(place), keep="last", ignore_index=True)
    line = [name for name in place if name not in repeated]
    newest = frame.groupby(line, sort=False, dropna=False)["version"].transform("last")
    return frame[frame["version"] == newest].reset_index(drop=True)


def failures(rows: Iterable[Mapping[str, Any]], place: Sequence[str]) -> DataFrame:
    """Return a frame of the places whose newest row is an error, with the errors."""
    from pandas import DataFrame

    frame = DataFrame(rows, columns=[*place, "error"]).drop_duplicates(list(place), keep="last")
    return frame[frame["error"].notna()].reset_index(drop=True)
