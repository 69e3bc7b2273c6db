"""Which rows of `bench accuracy` and `bench latency` may be compared: what tables show of a file.

The simulator, which repeats measured runs, takes the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from codedinvnet.rows import PLACES, Row, agreeing, newest

SHARED = ("quick", "grouping_seed", "test_images", "train_images")
"""Settings without which methods were not given the same groups, or not the same chances."""
SETTING = ("dataset", "k", "missing", "corrupt")
"""What methods are compared in: there they must also have tried as many erasure patterns."""


def accuracy_place(row: Row) -> tuple[str, str, str, int, int, int]:
    """Return label, data set, base model, k, missing and corrupt: what a line of a table is of."""
    words = (row["label"], row["dataset"], row["base"])
    return (*words, row["k"], row["missing"], row["corrupt"])


def current_accuracy(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of `bench accuracy` that may be compared with each other, failed ones, too.

    A row that was written again replaces the old one. Of a data set only rows count that were made
    as its last one was, as far as SHARED goes; of a setting those with as many patterns as its last
    one; of a base model those with its last weights; of a line those with its last settings. Quick
    rows count where a data set has no others.
    """
    kept = sorted(newest(rows).values(), key=lambda row: not row["settings"]["quick"])
    kept = agreeing(
        kept,
        lambda row: row["dataset"],
        lambda row: [row["settings"].get(name) for name in SHARED],
    )
    kept = agreeing(
        kept,
        lambda row: tuple(row[name] for name in SETTING),
        lambda row: row["settings"]["patterns"],
    )
    kept = agreeing(
        kept,
        lambda row: (row["dataset"], row["bundle"], row["base"]),
        lambda row: [row["settings"].get(name) for name in ("bundle", "plain")],
    )
    return agreeing(kept, accuracy_place, lambda row: row["settings"])


def latency_place(row: Mapping[str, Any]) -> tuple[str, int, float, str, str]:
    """Return data set, batch, load, stragglers and label: what a line of a table is of."""
    return row["dataset"], row["batch"], row["load"], row["straggler_model"], row["label"]


OWN = ("backup", "parity_wait_ms")
"""Settings that some methods' rows alone have: those with a part, and those with parities."""


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
