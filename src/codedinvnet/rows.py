"""Result rows: one JSON object a line, appended as trials end, read again by tables and plots.

A row carries its settings, commit, machine, seed and time. Interrupted writing costs the last line
alone, unless all but its newline was written. Which rows of a file may be compared is said by
`current_accuracy` and `current_latency`: tables and the simulator take these alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from codedinvnet.errors import UserError
from codedinvnet.files import parse_json
from codedinvnet.provenance import describe_commit, describe_machine

SCHEMA_VERSION = 1

Row: TypeAlias = dict[str, Any]
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])


def key_of(*parts: Any) -> str:
    """Return a short name of JSON values that differs when they do."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(*parts: Any) -> int:
    """Return a seed below 2³¹ for what JSON values name, so that each has draws of its own."""
    return zlib.crc32(json.dumps(parts).encode()) // 2


TRIAL: Mapping[str, tuple[type, ...]] = {
    "key": (str,),
    "settings": (dict,),
    "error": (str, type(None)),
}
"""What every row of a trial has, of whatever kind, and of which types."""
PLACES: Mapping[str, tuple[str, ...]] = {
    "accuracy": ("label", "method", "dataset", "base", "bundle", "k", "missing", "corrupt"),
    "latency": (
        *("dataset", "batch", "load", "straggler_model", "label"),
        *("stragglers", "machine", "cores"),
    ),
}
"""Which trial a row of a kind is of, and what it is compared by."""


def measured_row(header: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
    """Measure, and return a row: the header, what measured and when, and the figures.

    An error is a row, too, without figures, so that one trial does not take the others with it.
    """
    row: Row = {
        "schema_version": SCHEMA_VERSION,
        **header,
        "commit": describe_commit(),
        "machine": describe_machine(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    began, error = time.monotonic(), None
    try:
        row |= measure()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {**row, "seconds": round(time.monotonic() - began, 1), "error": error}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file; a line that an interrupted writer left unfinished is cut off first.

    One that lacks its newline alone is kept, and given one.

    Raises:
        UserError: if all that the file holds is no beginning of a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        content = file.seek(0, os.SEEK_END)
        if content:
            file.seek(content - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                whole, newline, last = file.read().rpartition(b"\n")
                if is_whole(last):
                    file.write(b"\n")
                else:
                    _check_begun(path, whole, last)
                    file.truncate(len(whole + newline))
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _check_begun(path: Path, whole: bytes, last: bytes) -> None:
    """Refuse what no writer of rows can have left: a note or a picture, which would be lost.

    Args:
        path: of the file.
        whole: its lines but for the last.
        last: the line without a newline, which is no row.
    """
    if last and not whole and not last.startswith(b"{"):
        raise UserError(f"{path} does not hold rows: name another file, or move this one away")


def is_whole(line: bytes) -> bool:
    """Tell whether a line without its newline is all of a row; a cut one is no JSON object."""
    try:
        return isinstance(parse_json(line, "the last line"), dict)
    except UserError:
        return False


def read_rows(path: Path, kind: str | None = None) -> list[Row]:
    """Return the rows of a file, oldest first; [] if there is none.

    What stands behind the last newline is a row if all of it was written, and else ignored.

    Args:
        path: the file.
        kind: of the benchmark that alone may have written them, "accuracy" or "latency"; None: any.

    Raises:
        UserError: if it is no file that can be read, or a whole line is not a row of this schema
            and kind, or lacks what all rows of that kind have.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the rows in {path}: {error.strerror or error}") from error
    if not is_whole(lines[-1]):
        last = lines.pop()
        _check_begun(path, b"\n".join(lines), last)
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line, f"{path}, line {number}")
        version = row.get("schema_version") if isinstance(row, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}, line {number}: schema version {version}; "
                f"this release reads version {SCHEMA_VERSION}"
            )
        found = row.get("kind", row.get("benchmark"))
        if kind not in (None, found):
            raise UserError(
                f"{path}, line {number}: a row of {found or 'something else'}, not of bench {kind}"
            )
        lacks = [name for name, kinds in TRIAL.items() if not isinstance(row.get(name, ...), kinds)]
        lacks += [name for name in PLACES.get(kind or "", ()) if name not in row]
        if kind is not None and not lacks and "quick" not in row["settings"]:
            lacks = ["settings.quick"]
        if kind is not None and lacks:
            raise UserError(f"{path}, line {number}: a row of bench {kind} without {lacks[0]}")
        rows.append(row)
    return rows


def newest(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the last row of every trial, by its key, in the order of these last ones."""
    found: dict[str, Row] = {}
    for row in rows:
        found.pop(row["key"], None)
        found[row["key"]] = row
    return found


def agreeing(
    rows: Sequence[AnyRow], place: Callable[[AnyRow], Any], made: Callable[[AnyRow], Any]
) -> list[AnyRow]:
    """Return the rows that were made as the last one of their place was.

    Args:
        rows: oldest first.
        place: where a row stands; hashable. Rows of one place are compared with each other.
        made: what must then be the same for all of them.
    """
    last = {place(row): made(row) for row in rows}
    return [row for row in rows if made(row) == last[place(row)]]


SHARED = (
    *("quick", "grouping_seed", "split"),
    *("test_images", "test_digest", "train_images", "train_digest"),
)
"""Settings without which methods were not given the same groups, or not the same chances."""
SETTING = ("dataset", "k", "missing", "corrupt")
"""What methods are compared in: there they must also have tried as many erasure patterns."""


def accuracy_place(row: Row) -> tuple[str, str, str, int, int, int]:
    """Return label, data set, base model, k, missing and corrupt: what a line of a table is of."""
    words = (row["label"], row["dataset"], row["base"])
    return (*words, row["k"], row["missing"], row["corrupt"])


def current_accuracy(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of `bench accuracy` that may be compared with each other, failed ones, too.

    A row that was written again replaces the old one. Rows of another version of a method that is
    known here do not count, nor those of other weights of a bundle that ships. Of a data set only
    rows count that were made as its last one was, as far as SHARED goes; of a setting those with as
    large a sample of patterns as its last one, and all that tried every pattern; of a base model
    those with its last weights; of a method of one's own those of its last file; of a line those
    with its last settings, one a seed. Quick rows count where a data set has no others. A failed
    row decides this of failed rows alone.
    """
    kept = sorted(_of_today(newest(rows).values()), key=lambda row: not row["settings"]["quick"])
    good = _comparable([row for row in kept if row["error"] is None])
    failed = [row for row in _comparable(kept) if row["error"] is not None]
    keys = {row["key"] for row in (*good, *failed)}
    return [row for row in kept if row["key"] in keys]


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows made as the last one of their data set, setting, base, method and line."""
    kept = agreeing(
        rows,
        lambda row: row["dataset"],
        lambda row: [row["settings"].get(name) for name in SHARED],
    )
    kept = agreeing(
        kept,
        lambda row: (*(row[name] for name in SETTING), _sampled(row)),
        lambda row: _sampled(row) and row["settings"]["patterns"],
    )
    kept = agreeing(
        kept,
        lambda row: (row["dataset"], row["bundle"], row["base"]),
        lambda row: [row["settings"].get(name) for name in ("bundle", "plain")],
    )
    kept = agreeing(
        kept,
        lambda row: (row["dataset"], row["label"]),
        lambda row: row["settings"].get("method"),  # of one's own: the digest of its file
    )
    kept = agreeing(kept, accuracy_place, lambda row: row["settings"])
    # A bundle that was named by another path is no further training.
    return list({(accuracy_place(row), row["seed"]): row for row in kept}.values())


def _sampled(row: Row) -> bool:
    """Return whether more erasure patterns are possible than were to be tried.

    A row that failed does not say how many workers there are: it may be no more than two for each
    member.
    """
    possible = math.comb(row["k"] + row.get("r", row["k"]), row["missing"])
    return bool(possible > row["settings"]["patterns"])


def _of_today(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of `bench accuracy` whose method and weights are those of this package.

    Methods that are not known here are taken as they are, and so are bundles that do not ship.
    """
    # They import PyTorch, which whoever sends load to a server may not have.
    from codedinvnet.codes.registry import known_method
    from codedinvnet.models.bundle import shipped_bundles, weights_digest

    rows = list(rows)
    methods = {name: known_method(name) for name in {row["method"] for row in rows}}
    weights = {name: weights_digest(name) for name in shipped_bundles()}

    def fits(row: Row) -> bool:
        settings, method = row["settings"], methods[row["method"]]
        expected: dict[str, Any] = {"version": None, **method.versions()} if method else {}
        if "bundle" in settings and row["bundle"] in weights:
            expected["bundle"] = weights[row["bundle"]]
        return key_of(expected) == key_of({name: settings.get(name) for name in expected})

    return [row for row in rows if fits(row)]


def latency_place(row: Mapping[str, Any]) -> tuple[str, int, float, str, str]:
    """Return data set, batch, load, stragglers and label: what a line of a table is of."""
    return row["dataset"], row["batch"], row["load"], row["straggler_model"], row["label"]


OWN = ("classifier", "backup", "parity", "parities", "paper", "parity_wait_ms", "method")
"""Settings that some methods' rows alone have: how a part was trained, how long parities wait, and
what tells a method from an earlier one of its name."""


def is_latency_row(row: Mapping[str, Any]) -> bool:
    """Return whether a row has what `current_latency` reads; rows of somebody else may not."""
    settings = row.get("settings")
    return (
        row.keys() >= {"key", *PLACES["latency"]}
        and isinstance(settings, dict)
        and "quick" in settings
    )


def current_latency(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of `bench latency` that belong together, failed ones, too.

    A row that was written again replaces the old one. Of a data set only rows count that have the
    settings of its last one (those aside that some methods have: OWN), of a setting those with
    the faults that were injected last, and of a line those with its last settings, machine and
    cores (but for the threads of the process that sent: the service's own have one each). Quick
    rows count where a data set has no others.
    """
    found = newest(dict(row) for row in rows if row.get("kind") == "latency").values()
    kept = sorted(found, key=lambda row: not row["settings"]["quick"])
    kept = agreeing(
        kept,
        lambda row: row["dataset"],
        lambda row: {name: value for name, value in row["settings"].items() if name not in OWN},
    )
    kept = agreeing(kept, lambda row: latency_place(row)[:-1], lambda row: row["stragglers"])
    return agreeing(
        kept, latency_place, lambda row: [row["settings"], _served_on(row), row["cores"]]
    )


def _served_on(row: Row) -> str:
    return re.sub(r", \d+ threads?\b", "", row["machine"])
