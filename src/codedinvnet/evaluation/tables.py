"""Frames of the rows of `bench accuracy`, and what all Markdown tables share.

A frame has a line for each method in each setting. A ± is half of the 95 % interval over trainings
from other seeds; it takes three of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, MultiIndex, Series

from codedinvnet.codes.registry import METHODS
from codedinvnet.common.files import write_atomically
from codedinvnet.common.grid import Row, failures, latest, read_rows
from codedinvnet.common.quantiles import clustered_ci
from codedinvnet.data.load import KNOWN

# Any table


def one_line(value: Any) -> str:
    """Return a value as text that fits a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def markdown(frame: DataFrame, formats: Mapping[str, str] = {}) -> str:
    """Return a frame as a Markdown table without its index; what is missing is an empty cell.

    Args:
        frame: the table.
        formats: column -> format specification of its values.
    """

    def shown(value: Any, form: str) -> str:
        return "" if pd.isna(value) else one_line(format(value, form))

    columns = [str(column) for column in frame.columns]
    if not columns:
        return ""
    cells = [
        [shown(value, formats.get(name, "")) for name, value in zip(columns, row, strict=True)]
        for row in frame.itertuples(index=False)
    ]
    rows = [columns, ["---"] * len(columns), *cells]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def plus_minus(values: Series, spreads: Series) -> Series:
    """Return values as text, each with its ± if there is one."""
    pairs = zip(values, spreads, strict=True)
    texts = [
        None if pd.isna(value) else f"{value:.2f}" + ("" if pd.isna(spread) else f" ± {spread:.2f}")
        for value, spread in pairs
    ]
    return Series(texts, index=values.index, dtype=object)


def spread(values: Iterable[float]) -> float:
    """Return the ± of repetitions' values; NaN if there is none."""
    half = clustered_ci(list(values))
    return math.nan if half is None else half


def in_order(frame: DataFrame, **known: Iterable[Any]) -> DataFrame:
    """Sort by columns, each column's known values first, in their order."""
    places = {name: {v: i for i, v in enumerate(own)} for name, own in known.items()}

    def key(column: Series) -> Series:
        own = places[column.name]
        return column.map(lambda value: (own.get(value, len(own)), value))

    return frame.sort_values(list(known), key=key, kind="stable", ignore_index=True)


def write_tables(rows_file: Path, sections: Mapping[str, str], frame: DataFrame) -> list[Path]:
    """Write the tables that have a line, and the frame, as .md and .csv next to a file of rows."""
    page, table = rows_file.with_suffix(".md"), rows_file.with_suffix(".csv")
    kept = {title: text for title, text in sections.items() if text.count("\n") > 2}
    whole = "\n".join(f"# {title}\n\n{text}" for title, text in kept.items())
    write_atomically(page, whole.encode())
    write_atomically(table, frame.to_csv(index=False, float_format="%.6g").encode())
    return [page, table]


# Accuracy

SETTING = ["dataset", "k", "missing"]
PLACE = [*SETTING, "method", "base"]
TRIAL = [*SETTING, "label", "base", "seed"]
"""The fields of a row that tell a trial from others."""
SHARES = ("normal", "complete", "recovered", "answered")
SHIPPED = Path(__file__).with_name("accuracy.csv")
"""The frame of the shipped rows, docs/results/accuracy.jsonl."""


def accuracy_frame(rows: Iterable[Row]) -> DataFrame:
    """Return the frame of `bench accuracy`; shares in %, means over the seeds.

    `complete` is what codes without direct answers give when no worker is missing. `answered` is
    there where some answers were not. `spends` is what the extra workers compute for a full group,
    in queries of the served model, by the newest row that says so.
    """
    trials = latest(rows, TRIAL, repeated=["seed"])
    lines = []
    for place, own in trials.groupby(TRIAL[:-1], sort=False):
        last = own.iloc[-1]
        line: dict[str, Any] = dict(zip(PLACE, place, strict=True))
        line |= {"extra": 100 * last["r"] / last["k"], "spends": math.nan}
        if "extra_macs" in own:
            spent = (own["extra_macs"] / own["served_macs"]).dropna()
            line["spends"] = float(spent.iloc[-1]) if len(spent) else math.nan
        for name in SHARES:
            values = [100 * value for value in own[name].astype(float)]
            line |= {name: sum(values) / len(values), f"{name} ±": spread(values)}
        line["answered ±"] = math.nan
        if line["base"] != "resnet":  # of which each seed trains its own
            line["normal ±"] = math.nan
        if last["systematic"]:
            line |= {"complete": math.nan, "complete ±": math.nan}
        if line["answered"] == 100:
            line["answered"] = math.nan
        lines.append({**line, "seeds": len(own)})
    shares = [f"{name}{end}" for name in SHARES for end in ("", " ±")]
    frame = DataFrame(lines, columns=[*PLACE, "extra", "spends", *shares, "seeds"])
    order = {"dataset": KNOWN, "k": (), "missing": (), "method": METHODS}
    return in_order(frame, **order, base=())


def on_f(frame: DataFrame) -> DataFrame:
    """Keep each method's line on the bundle's f, or on the plain ResNet if it has no other.

    The base model is fixed before anything is measured: a choice by accuracy would be made on the
    test images that the table is about.
    """
    known = frame[frame["recovered"].notna()]
    place = [*SETTING, "method"]
    return known.sort_values("base", kind="stable").groupby(place, sort=False).head(1).sort_index()


def accuracy_table(frame: DataFrame) -> str:
    """Return the Markdown table of lines of one data set or several."""
    table = frame[PLACE].assign(
        extra=frame["extra"].map("{:.0f} %".format),
        spends=frame["spends"].map("{:.2f}".format, na_action="ignore"),
        **{name: plus_minus(frame[name], frame[f"{name} ±"]) for name in SHARES},
        seeds=frame["seeds"],
    )
    if table["dataset"].nunique() == 1:
        table = table.drop(columns="dataset")
    return markdown(table.rename(columns={"complete": "none missing"}))


def with_shipped(frame: DataFrame) -> DataFrame:
    """Add what shipped of other methods in the same settings, on the same base models."""
    if not SHIPPED.is_file() or frame.empty:
        return frame
    shipped = pd.read_csv(SHIPPED)
    place = [*SETTING, "base"]
    here = shipped.set_index(place).index.isin(frame.set_index(place).index)
    known = shipped.set_index(PLACE).index.isin(frame.set_index(PLACE).index)
    own = {"dataset": KNOWN, "k": (), "missing": (), "base": ()}
    both = pd.concat([frame, shipped[here & ~known].reindex(columns=frame.columns)])
    return in_order(both, **own, method=frame["method"].unique())


def shown_frame(rows_file: Path, compare: bool = False) -> DataFrame:
    """Return the frame of a file of rows, with what shipped of other methods if asked for."""
    frame = accuracy_frame(read_rows(rows_file, "accuracy"))
    return with_shipped(frame) if compare else frame


def brief(frame: DataFrame) -> str:
    """Return how often late answers are right, in %, a line for each method, for a terminal."""
    shown = on_f(frame).sort_values("missing", kind="stable")
    if shown.empty:
        return ""
    columns = ["missing", "dataset", "k"]
    table = shown.pivot(index="method", columns=columns, values="recovered")
    table = table.reindex(
        shown["method"].unique(), columns=MultiIndex.from_frame(shown[columns]).unique()
    )
    text: str = table.rename_axis(index=None).to_string(float_format="%.2f", na_rep="")
    return text


def write_accuracy(rows_file: Path, compare: bool = False) -> list[Path]:
    """Write the tables of a file of rows next to it, as .md and .csv; return what was written.

    To `compare` adds what shipped of other methods.
    """
    rows = read_rows(rows_file, "accuracy")
    if not rows:
        return []
    shown = shown_frame(rows_file, compare)
    settings = rows[-1]["settings"]
    split = settings.get("split")
    title = f"Accuracy on {split} images, %" if split else "Accuracy, %"
    if compare and settings["quick"]:
        title += f", measured in short on {settings['test_images']} images, beside shipped rows"
    sections = {
        title: accuracy_table(shown),
        "Failed trials": markdown(failures(rows, TRIAL)),
    }
    return write_tables(rows_file, sections, shown)
