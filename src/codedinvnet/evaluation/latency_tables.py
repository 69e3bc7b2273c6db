"""Frames and tables of the rows of `bench latency`: percentiles, work, and who has the best tail.

A ± is half of the 95 % interval over runs; it takes three of them, and two of each load in ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from pandas import DataFrame

from codedinvnet.codes.named_policies import SERVED
from codedinvnet.common.grid import Row, failures, latest, read_rows
from codedinvnet.common.quantiles import Histogram, around, clustered_ci, rank_of
from codedinvnet.data.load import KNOWN
from codedinvnet.evaluation.tables import in_order, markdown, plus_minus, spread, write_tables
from codedinvnet.simulation.figures import QUANTILES, SAME

BEYOND = 10
"""Methods are compared by the highest percentile with so many requests of each above it."""
TITLES = {"p50": "p50", "p99": "p99", "p995": "p99.5", "p999": "p99.9"}
TAILS = ("p99", "p995", "p999")
"""Percentiles that methods are compared by; a median is no tail."""
SETTING = ["dataset", "batch", "load", "straggler_model"]
RUN = [*SETTING, "label", "run"]
"""The fields of a row that tell a run from others."""
RUN_SETTING = ["dataset", "batch", "load", "stragglers"]
MEANS = {"decoded_share": "decoded", "missing_share": "lost", "accuracy": "accuracy"}
"""Figures that are means over runs, and their columns; shares in %."""


def runs_of(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Return the frame of the runs that count, with their histograms."""
    runs = latest(rows, RUN, repeated=["run"])
    return runs.assign(latencies=[Histogram.of_row(row) for row in runs.to_dict("records")])


def latency_frame(rows: Iterable[Row]) -> DataFrame:
    """Return the frame of `bench latency`: percentiles of all runs' requests together, in ms.

    An interval is over the runs. A percentile that no request lies beyond is not there; where more
    was lost than it allows, it is infinite.
    """
    lines = []
    for place, own in runs_of(rows).groupby([*SETTING, "label"], sort=False):
        runs = list(own["latencies"])
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
            values = [100 * value for value in own[figure]]
            line |= {name: sum(values) / len(values), f"{name} ±": spread(values)}
        line |= {"work": own["work_per_query"].mean(), "work ±": spread(own["work_per_query"])}
        lines.append({**line, "runs": len(own), "requests": whole.total})
    columns = [f"{name}{end}" for name in QUANTILES for end in ("", " low", " high")]
    columns += [f"{name}{end}" for name in (*MEANS.values(), "work") for end in ("", " ±")]
    frame = DataFrame(lines, columns=[*RUN_SETTING, "method", *columns, "runs", "requests"])
    largest = sorted(set(frame["batch"]), reverse=True)
    return in_order(frame, dataset=KNOWN, batch=largest, load=(), stragglers=(), method=SERVED)


def latency_table(frame: DataFrame) -> str:
    """Return the Markdown table of a latency frame's lines."""

    def shown(line: Mapping[str, Any], name: str) -> str:
        value, low, high = (line[f"{name}{end}"] for end in ("", " low", " high"))
        if math.isnan(value):
            return "–"
        text = f"{value:.1f}" if math.isfinite(value) else "never"
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


def farthest(requests: int) -> str:
    """Return the highest percentile with ten of so many requests above it, or p99."""
    held = [name for name in TAILS if (1 - QUANTILES[name]) * requests >= BEYOND]
    return held[-1] if held else TAILS[0]


def tails_table(frame: DataFrame) -> str:
    """Return the Markdown table of how near every method's tail comes to the lowest.

    The tail of a setting is the highest percentile that all its methods have enough requests for.
    Methods that are in less than half of the settings are left out, and then settings in which a
    method is missing, or none has a finite tail.
    """
    fewest = frame.groupby(RUN_SETTING)["requests"].transform("min")
    tail = [line[farthest(n)] for line, n in zip(frame.to_dict("records"), fewest, strict=True)]
    table = frame.assign(tail=tail).pivot(index=RUN_SETTING, columns="method")
    kept = table["tail"].dropna(axis="columns", thresh=math.ceil(len(table) / 2)).dropna()
    kept = kept[kept.min(axis="columns").map(math.isfinite)].astype(float)
    ratios = kept.div(kept.min(axis="columns"), axis="index")
    ratios = ratios[[name for name in SERVED if name in ratios]]
    lines = [
        {
            "method": name,
            f"within {SAME:.0%} of the lowest": f"{(own <= 1 + SAME).sum()} of {len(own)}",
            "median, over the lowest": f"{own.median():.2f}".replace("inf", "never"),
            "worst, over the lowest": f"{own.max():.2f}".replace("inf", "never"),
            "work": f"{table['work'].loc[kept.index, name].mean():.2f}",
        }
        for name, own in ratios.items()
    ]
    return markdown(DataFrame(lines))


def paired(rows: Iterable[Row], rival: str) -> DataFrame:
    """Return how much longer or shorter methods' tails are than a rival's, in the geometric mean.

    Both met the same arrivals and faults in a run of a setting, so each run gives one ratio: of the
    highest percentile with ten requests of both above it. The mean is over the loads; the interval
    counts only what the runs of each load differ by. The result has a row for each method, and a
    column for each straggler model and number of images.
    """
    runs = runs_of(rows)
    own = runs[runs["label"] != rival]
    both = own.merge(runs[runs["label"] == rival], on=[*SETTING, "run"], suffixes=("", " rival"))

    def logarithm(line: Mapping[str, Any]) -> float:
        pair = line["latencies"], line["latencies rival"]
        share = QUANTILES[farthest(min(one.total for one in pair))]
        return math.log(pair[0].percentile(share) / pair[1].percentile(share))

    both = both.assign(log=[logarithm(line) for line in both.to_dict("records")])
    found: dict[str, dict[str, str]] = {}
    for (label, model, batch), lines in both.groupby(
        ["label", "straggler_model", "batch"], sort=False
    ):
        row = found.setdefault(label, {"method": label})
        row[f"{model}, {batch}"] = _geometric(lines)
    return in_order(DataFrame([*found.values()], dtype=object), method=SERVED)


def _geometric(lines: DataFrame) -> str:
    """Return the geometric mean of loads' ratios with its interval; "never" if one has no end."""
    if not all(map(math.isfinite, lines["log"])):
        return "never"
    mean = statistics.fmean(lines.groupby("load")["log"].mean())
    half = clustered_ci(list(lines["log"]), list(lines["load"]), fewest=2, pooled=True)
    ends = "" if half is None else f" ({math.exp(mean - half):.2f}–{math.exp(mean + half):.2f})"
    return f"{math.exp(mean):.2f}{ends}"


def write_latency(rows_file: Path) -> list[Path]:
    """Write the tables of a file of rows next to it, as .md and .csv; return what was written."""
    rows = read_rows(rows_file, "latency")
    if not rows:
        return []
    frame = latency_frame(rows)
    sections = {
        "Tails compared with the lowest": tails_table(frame) if len(frame) else "",
        "Latency, ms": latency_table(frame),
        "Failed runs": markdown(failures(rows, RUN)),
    }
    return write_tables(rows_file, sections, frame)
