"""Figures of `bench latency`, made from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from codedinvnet.bench.latency_tables import TITLES, Line, farthest, lines_of
from codedinvnet.bench.plots import legend, save_beside
from codedinvnet.rows import read_rows
from codedinvnet.simulation.figures import latencies_of
from codedinvnet.simulation.picture import colour


def _panels(lines: Sequence[Line], draw: Callable[[Axes, Line], None]) -> Figure | None:
    """Draw lines into a panel a setting: straggler models across, kinds of load down."""
    if not lines:
        return None
    down = list(dict.fromkeys((line.dataset, line.batch, line.load) for line in lines))
    across = sorted({line.stragglers for line in lines})
    figure, axes = plt.subplots(
        len(down),
        len(across),
        figsize=(1.8 + 3.9 * len(across), 0.6 + 3.2 * len(down)),
        squeeze=False,
        constrained_layout=True,
    )
    for row, place in zip(axes, down, strict=True):
        for axis, stragglers in zip(row, across, strict=True):
            dataset, batch, load = place
            images = "single images" if batch == 1 else f"batches of {batch}"
            axis.set_title(f"{dataset}: {images}, {load:.0%}, {stragglers}", fontsize="small")
            axis.grid(alpha=0.3, which="both")
            shown = [x for x in lines if x.setting == (*place, stragglers)]
            for line in shown:
                draw(axis, line)
            if not shown:
                axis.set_axis_off()
    legend(figure, list(axes.flat))
    return figure


def curve(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Return latencies in ms (n,) and the shares (n,) of requests that take longer.

    They are of all runs' requests together. Where less than a request takes longer, it ends.
    """
    count = sum(row["requests"] for row in line.rows)
    known = [value for row in line.rows for value in (*row["quantiles_ms"], *row["tail_ms"])]
    latency = np.unique(latencies_of([value for value in known if value is not None]))
    later = 1 - np.mean([_within(row, latency) for row in line.rows], axis=0)
    falls = np.diff(later, prepend=math.inf) < 0
    kept = falls & (later > 0.99 / count)
    return latency[kept], later[kept]


def _within(row: Mapping[str, Any], latency: np.ndarray) -> np.ndarray:
    """Return the shares (n,) of a run's requests that latencies in ms (n,) are enough for.

    They are exact as far down as the row keeps its largest latencies, and between its quantiles
    below.
    """
    count, tail = row["requests"], np.sort(latencies_of(row["tail_ms"]))
    reach = 1 - len(tail) / count
    exact = reach + np.searchsorted(tail, latency, side="right") / count
    pairs = zip(row["quantiles_ms"], row["shares"], strict=True)
    body = [(ms, share) for ms, share in pairs if ms is not None and share <= reach]
    if body:
        ms, shares = np.array(body).T
        exact = np.where(latency < tail[0], np.interp(latency, ms, shares), exact)
    return np.asarray(exact)


def _logarithmic(axis: Axes, title: str) -> None:
    """Put latencies on the axis; 1, 2 and 5 of every decade are named, if there are few decades."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize="x-small")
    axis.set_xlabel(title, fontsize="small")


def tails(lines: Sequence[Line]) -> Figure | None:
    """Draw the share of requests that take longer, on a logarithmic axis, against the latency."""

    def draw(axis: Axes, line: Line) -> None:
        latency, later = curve(line)
        axis.plot(latency, later, color=colour(line.label), label=line.label, linewidth=1.4)
        _logarithmic(axis, "latency, ms")
        axis.set_yscale("log")
        axis.set_ylabel("share of requests that take longer", fontsize="small")

    return _panels(lines, draw)


def against_accuracy(lines: Sequence[Line]) -> Figure | None:
    """Draw overall accuracy against the farthest percentile, a point a method."""
    tails = farthest(lines)

    def draw(axis: Axes, line: Line) -> None:
        found = tails.get((line.setting, line.label))
        if found is None or not np.isfinite(found[1].value):
            return
        name, value = found
        spread = line.spread("accuracy")
        low, high = value.interval or (value.value, value.value)
        axis.errorbar(
            [value.value],
            [100 * line.mean("accuracy")],
            yerr=None if spread is None else [100 * spread],
            xerr=[[max(0.0, value.value - low)], [max(0.0, high - value.value)]],
            marker="o",
            linestyle="none",
            color=colour(line.label),
            label=line.label,
        )
        _logarithmic(axis, f"{TITLES[name]}, ms")
        axis.set_ylabel("overall accuracy, %", fontsize="small")

    return _panels(lines, draw)


FIGURES = {"tails": tails, "accuracy": against_accuracy}


def write(rows_file: Path) -> list[Path]:
    """Draw the figures of a file of rows beside it, as STEM-NAME.png; return what was written."""
    lines = lines_of(read_rows(rows_file))
    return save_beside(rows_file, {name: draw(lines) for name, draw in FIGURES.items()})
