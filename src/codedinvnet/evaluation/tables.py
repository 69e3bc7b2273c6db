"""Frames of the rows of `bench accuracy` and `bench latency`, and what all tables share.

A frame has a line for each method in each setting. A ± is half of the 95 % interval over
repetitions (trainings from other seeds, or runs); without three of them there is none. At equal
cost (`benchmarks`) two trainings do, and in ratios of latencies two runs of each load. What no
repetition can change has none: the direct answers of f, or which answers there are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from codedinvnet.codes.registry import METHODS, known_method
from codedinvnet.data.load import KNOWN
from codedinvnet.evaluation.quantiles import (
    Histogram,
    around,
    half_width,
    half_width_within,
    rank_of,
)
from codedinvnet.files import write_atomically, write_text
from codedinvnet.rows import Row, current_accuracy, current_latency, read_rows
from codedinvnet.serving.policies import SERVED
from codedinvnet.simulation.figures import QUANTILES, SAME

BEYOND = 10
"""Methods are compared by the farthest percentile that so many requests of each lie beyond."""
TITLES = {"p50": "p50", "p99": "p99", "p995": "p99.5", "p999": "p99.9"}
TAILS = ("p99", "p995", "p999")
"""Percentiles that methods are compared by; a median is no tail."""


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


def spread(values: Iterable[float | None]) -> float:
    """Return the ± of repetitions' values; NaN if there is none."""
    known = [math.nan if value is None else float(value) for value in values]
    half = half_width(known)
    return math.nan if half is None else half


def in_order(frame: DataFrame, **known: Iterable[Any]) -> DataFrame:
    """Sort by columns; of each the known values come first in their order, others behind them."""
    places = {name: {v: i for i, v in enumerate(own)} for name, own in known.items()}

    def key(column: Series) -> Series:
        own = places[column.name]
        return column.map(lambda value: (own.get(value, len(own)), value))

    return frame.sort_values(list(known), key=key, kind="stable", ignore_index=True)


def failures(rows: Iterable[Row], columns: Sequence[str]) -> DataFrame:
    """Return the trials that failed, with their errors."""
    failed = [row for row in rows if row["error"] is not None]
    return DataFrame([[row[name] for name in columns] for row in failed], columns=[*columns])


# Accuracy

SETTING = ["dataset", "k", "missing", "corrupt"]
PLACE = [*SETTING, "method", "base"]
SHARES = ("normal", "complete", "recovered", "answered")


def accuracy_frame(rows: Iterable[Row]) -> DataFrame:
    """Return the frame of `bench accuracy`; shares in %, means over the seeds.

    `complete` is what codes without direct answers give when nobody is missing; for others, and
    where workers are corrupt, it is not there. `answered` is there where some answers were not.
    `spends` is what the extra workers compute for a full group, in queries of the served model.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in current_accuracy(rows):
        if row["error"] is None:
            place = (*(row[name] for name in SETTING), row["label"], row["base"])
            found.setdefault(place, []).append(row)
    lines = []
    for place, own in found.items():
        line = dict(zip(PLACE, place, strict=True)) | {"extra": 100 * own[0]["r"] / own[0]["k"]}
        line["spends"] = spent(own)
        for name in SHARES:
            values = [math.nan if row[name] is None else 100 * row[name] for row in own]
            line |= {name: sum(values) / len(values), f"{name} ±": spread(values)}
        line["answered ±"] = math.nan
        if line["base"] != "resnet":  # of which each seed trains its own
            line["normal ±"] = math.nan
        if own[0]["systematic"] or own[0]["corrupt"]:
            line |= {"complete": math.nan, "complete ±": math.nan}
        if line["answered"] == 100:
            line["answered"] = math.nan
        lines.append({**line, "seeds": len(own)})
    shares = [f"{name}{end}" for name in SHARES for end in ("", " ±")]
    frame = DataFrame(lines, columns=[*PLACE, "extra", "spends", *shares, "seeds"])
    order = {"dataset": KNOWN, "k": (), "missing": (), "corrupt": (), "method": METHODS}
    return in_order(frame, **order, base=())


def spent(rows: Sequence[Row]) -> float:
    """Return what the extra workers compute for a full group, in queries of the served model.

    The newest row tells that does; NaN if all are older than such counts.
    """
    counts = (row["extra_macs"] / row["served_macs"] for row in rows[::-1] if "extra_macs" in row)
    return float(next(counts, math.nan))


def best_bases(frame: DataFrame, approximate: float = 1.0) -> DataFrame:
    """Keep the base model of every method and setting on which most answers are right.

    Args:
        frame: of `accuracy_frame`.
        approximate: the share of answers that are recovered; at 1, only these count.
    """
    known = frame[frame["recovered"].notna()]
    right = (1 - approximate) * known["normal"] + approximate * known["recovered"]
    order = {"by": ["right", "recovered"], "ascending": False, "kind": "stable"}
    best = known.assign(right=right).sort_values(**order).groupby([*SETTING, "method"]).head(1)
    return known.loc[sorted(best.index)]


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
    return markdown(table.rename(columns={"complete": "nobody missing"}))


def published(frame: DataFrame) -> DataFrame:
    """Return the papers' figures of methods, beside ours.

    Ours are on a base model of the same kind if they were measured on one, else on the better.
    """
    ours = frame[(frame["missing"] == 1) & (frame["corrupt"] == 0) & frame["recovered"].notna()]
    found = []
    for (dataset, k, name), lines in ours.groupby(["dataset", "k", "method"], sort=False):
        method = known_method(str(name))
        for figure in method.published if method else ():
            if (figure.beside or figure.dataset, figure.k) != (dataset, k):
                continue
            alike = lines[lines["base"] == figure.base]
            kind = lines if alike.empty else alike
            line = kind.loc[kind["recovered"].idxmax()]
            found.append(
                {
                    "dataset": figure.dataset or f"not named (here {figure.beside})",
                    "k": figure.k,
                    "method": name,
                    "published base": figure.normal,
                    "published": figure.recovered,
                    "base here": f"{line['base']}, {line['normal']:.2f}",
                    "here": line["recovered"],
                    "difference": line["recovered"] - figure.recovered,
                    "source": figure.source,
                }
            )
    return DataFrame(found)


PUBLISHED_FORMATS = {
    **dict.fromkeys(("published base", "published"), ".1f"),
    "here": ".2f",
    "difference": "+.1f",
}
FAILED_TRIAL = ("dataset", "k", "missing", "corrupt", "label", "base", "seed", "error")


def write_accuracy(rows_file: Path) -> list[Path]:
    """Write the tables of a file of rows beside it, as .md and .csv; return what was written."""
    rows = read_rows(rows_file, "accuracy")
    if not rows:
        return []
    frame = accuracy_frame(rows)
    split = rows[-1]["settings"].get("split")
    sections = {
        f"Accuracy on {split} images, %" if split else "Accuracy, %": accuracy_table(frame),
        "Published figures": markdown(published(frame), PUBLISHED_FORMATS),
        "Failed trials": markdown(failures(current_accuracy(rows), FAILED_TRIAL)),
    }
    return _write(rows_file, sections, frame)


def _write(rows_file: Path, sections: Mapping[str, str], frame: DataFrame) -> list[Path]:
    """Write tables that have a line beside a file of rows, and the frame."""
    page, table = rows_file.with_suffix(".md"), rows_file.with_suffix(".csv")
    kept = {title: text for title, text in sections.items() if text.count("\n") > 2}
    write_text(page, "\n".join(f"# {title}\n\n{text}" for title, text in kept.items()))
    write_atomically(table, frame.to_csv(index=False, float_format="%.6g").encode())
    return [page, table]


# Latency

RUN_SETTING = ["dataset", "batch", "load", "stragglers"]
SAME_RUN = ("batch", "load", "dataset", "run")
"""What runs of a straggler model have in common that met the same arrivals and faults."""
MEANS = {"decoded_share": "decoded", "missing_share": "lost", "accuracy": "accuracy"}
"""Figures that are means over runs, and their columns; shares in %."""


def latency_frame(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Return the frame of `bench latency`: percentiles of all runs' requests together, in ms.

    An interval is over the runs. A percentile that no request lies beyond is not there; where more
    was lost than it allows, it is infinite.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in current_latency(rows):
        if row["error"] is None:
            place = (row["dataset"], row["batch"], row["load"], row["straggler_model"])
            found.setdefault((*place, row["label"]), []).append(row)
    lines = []
    for place, own in found.items():
        runs = [Histogram.of_row(row) for row in own]
        whole = reduce(add, runs)
        line: dict[str, Any] = dict(zip([*RUN_SETTING, "method"], place, strict=True))
        for name, share in QUANTILES.items():
            low = high = value = math.nan
            if rank_of(whole.total, share) < whole.total - 1:
                value = whole.percentile(share)
                interval = around([run.percentile(share) for run in runs], value)
                low, high = interval or (math.nan, math.nan)
            line |= {name: value, f"{name} low": low, f"{name} high": high}
        for figure, name in MEANS.items():
            values = [100 * row[figure] for row in own]
            line |= {name: sum(values) / len(values), f"{name} ±": spread(values)}
        work = [row["work_per_query"] for row in own]
        line |= {"work": sum(work) / len(work), "work ±": spread(work)}
        lines.append({**line, "runs": len(own), "requests": whole.total, "histogram": whole})
    columns = [f"{name}{end}" for name in QUANTILES for end in ("", " low", " high")]
    columns += [f"{name}{end}" for name in (*MEANS.values(), "work") for end in ("", " ±")]
    names = [*RUN_SETTING, "method", *columns, "runs", "requests", "histogram"]
    frame = DataFrame(lines, columns=names)
    largest = sorted(set(frame["batch"]), reverse=True)
    return in_order(frame, dataset=KNOWN, batch=largest, load=(), stragglers=(), method=SERVED)


def latency_table(frame: DataFrame) -> str:
    """Return the Markdown table of a latency frame's lines."""

    def shown(line: Mapping[str, Any], name: str) -> str:
        value, low, high = (line[f"{name}{end}"] for end in ("", " low", " high"))
        if math.isnan(value):
            return "–"
        text = milliseconds(value)
        return text if math.isnan(low) else f"{text} ({low:.1f}–{high:.1f})"

    lines = frame.to_dict("records")
    table = frame[["batch", "load", "stragglers", "method"]].assign(
        load=frame["load"].map("{:.0%}".format),
        **{title: [shown(line, name) for line in lines] for name, title in TITLES.items()},
        **{n: plus_minus(frame[n], frame[f"{n} ±"]) for n in (*MEANS.values(), "work")},
        runs=frame["runs"],
    )
    if frame["dataset"].nunique() > 1:
        table.insert(0, "dataset", frame["dataset"])
    return markdown(table)


def milliseconds(value: float) -> str:
    """Return a latency as tables have it; one without end is "never"."""
    return f"{value:.1f}" if math.isfinite(value) else "never"


def tails(frame: DataFrame) -> DataFrame:
    """Return the tails of a latency frame in ms: a row a setting, a column a method.

    Each is the farthest percentile beyond which every method of its setting has ten requests, or
    p99 if there is none; the index tells which.
    """
    found = {}
    for setting, own in frame.groupby(RUN_SETTING, sort=False):
        name = farthest(own["requests"].min())
        found[(*setting, name)] = own.set_index("method")[name]
    table = DataFrame(found).T
    return table[[name for name in frame["method"].unique() if name in table]]


def farthest(requests: int) -> str:
    """Return the farthest percentile that ten of so many requests lie beyond, or p99."""
    held = [name for name in TAILS if (1 - QUANTILES[name]) * requests >= BEYOND]
    return held[-1] if held else TAILS[0]


def paired(rows: Iterable[Row], rival: str) -> DataFrame:
    """Return how much longer or shorter methods' tails are than a rival's, in the geometric mean.

    Both met the same arrivals and faults in a run of a setting, so each run gives one ratio: of the
    farthest percentile that ten requests of both lie beyond. The mean is over the loads; the
    interval says how far it is off by what the runs of each load differ by.

    Args:
        rows: of `bench latency`.
        rival: the method in the denominator.

    Returns:
        A row a method, a column a straggler model and number of images; the text "ratio
        (low–high)", or "never" where requests were lost.
    """
    runs: dict[tuple[Any, ...], dict[str, Histogram]] = {}
    for row in current_latency(rows):
        if row["error"] is None:
            place = tuple(row[key] for key in ("straggler_model", *SAME_RUN))
            runs.setdefault(place, {})[row["label"]] = Histogram.of_row(row)
    ratios: dict[tuple[str, str], dict[float, list[float]]] = {}
    for (model, batch, load, _, _), own in runs.items():
        for label in own if rival in own else ():
            if label != rival:
                both = own[label], own[rival]
                share = QUANTILES[farthest(min(one.total for one in both))]
                tail, against = (one.percentile(share) for one in both)
                loads = ratios.setdefault((label, f"{model}, {batch}"), {})
                loads.setdefault(load, []).append(tail / against)
    found: dict[str, dict[str, str]] = {}
    for (label, column), loads in ratios.items():
        own_row = found.setdefault(label, {"method": label})
        own_row[column] = _geometric([*loads.values()])
    return in_order(DataFrame([*found.values()], dtype=object), method=SERVED)


def _geometric(loads: Sequence[Sequence[float]]) -> str:
    """Return the geometric mean of loads' ratios with its interval; "never" if one has no end."""
    if not all(math.isfinite(ratio) for runs in loads for ratio in runs):
        return "never"
    logs = [[math.log(ratio) for ratio in runs] for runs in loads]
    mean, half = statistics.fmean(map(statistics.fmean, logs)), half_width_within(logs)
    ends = "" if half is None else f" ({math.exp(mean - half):.2f}–{math.exp(mean + half):.2f})"
    return f"{math.exp(mean):.2f}{ends}"


def against_lowest(values: DataFrame, work: DataFrame | None = None) -> DataFrame:
    """Return how near methods' tails come to the lowest of each place.

    Args:
        values: in ms, a row a place and a column a method; infinite where too many are lost.
            Methods that are in less than half of the places are left out, and then places in which
            a method is missing, or nobody's is finite.
        work: in the same places, for a column of its own.
    """
    kept = values.dropna(axis="columns", thresh=math.ceil(len(values) / 2)).dropna()
    kept = kept[kept.min(axis="columns").map(math.isfinite)].astype(float)
    ratios = kept.div(kept.min(axis="columns"), axis="index")
    table = DataFrame(
        {
            "method": ratios.columns,
            f"within {SAME:.0%} of the lowest": [
                f"{int((ratios[name] <= 1 + SAME).sum())} of {len(ratios)}" for name in ratios
            ],
            "median, over the lowest": [_ratio(ratios[name].median()) for name in ratios],
            "worst, over the lowest": [_ratio(ratios[name].max()) for name in ratios],
        }
    )
    if work is None:
        return table
    means = work.loc[kept.index].mean()
    return table.assign(work=[f"{means[name]:.2f}" for name in ratios])


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


def tails_table(frame: DataFrame) -> str:
    """Return the Markdown table of how near every method's tail comes to the lowest."""
    values = tails(frame)
    work = frame.set_index([*RUN_SETTING, "method"])["work"].unstack()
    work = work.reindex(values.index.droplevel(-1)).set_axis(values.index)
    return markdown(against_lowest(values, work))


def write_latency(rows_file: Path) -> list[Path]:
    """Write the tables of a file of rows beside it, as .md and .csv; return what was written."""
    rows = read_rows(rows_file, "latency")
    if not rows:
        return []
    frame = latency_frame(rows)
    sections = {
        "Tails compared with the lowest": tails_table(frame) if len(frame) else "",
        "Latency, ms": latency_table(frame),
        "Failed runs": markdown(failures(current_latency(rows), ("name", "error"))),
    }
    return _write(rows_file, sections, frame.drop(columns="histogram"))
