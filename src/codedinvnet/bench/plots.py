"""Pictures of the benchmarks, each with one message, from the frames of `tables`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from pandas import DataFrame

from codedinvnet.bench.tables import (
    RUN_SETTING,
    accuracy_frame,
    best_bases,
    latency_frame,
    tails,
)
from codedinvnet.codes.registry import OURS, known_method
from codedinvnet.files import write_picture
from codedinvnet.rows import read_rows
from codedinvnet.simulation.picture import colour

STYLE = "seaborn-v0_8-whitegrid"


def accuracy_bars(frame: DataFrame) -> Figure | None:
    """Draw how often a late answer is right, a panel a data set, of the largest groups.

    The dashed line is the accuracy of direct answers. Bounds and variants are left out.
    """
    one = best_bases(frame[(frame["missing"] == 1) & (frame["corrupt"] == 0)])
    if one.empty:
        return None
    shown = [
        method is None or (method.in_brief and not method.is_bound)
        for method in map(known_method, one["method"])
    ]
    one = one[shown]
    one = one[one["k"] == one["k"].max()]
    if one.empty:
        return None
    names, methods = list(one["dataset"].unique()), list(one["method"].unique())[::-1]
    figure, axes = _panels(1, len(names), height=1.0 + 0.34 * len(methods), width=2.3)
    for axis, name in zip(axes, names, strict=True):
        own = one[one["dataset"] == name].set_index("method").reindex(methods)
        bars = axis.barh(
            methods,
            own["recovered"],
            xerr=own["recovered ±"].fillna(0.0),
            color=["#cc3311" if method == OURS else "#4477aa" for method in methods],
        )
        texts = ["" if math.isnan(value) else f"{value:.1f}" for value in own["recovered"]]
        axis.bar_label(bars, texts, label_type="center", color="white", fontsize=8)
        axis.axvline(own["normal"].max(), color="#333333", linestyle="--", linewidth=1)
        axis.set(title=f"{name}, k = {one['k'].max()}", xlabel="late answers right, %")
        axis.set_xlim(0, 100)
        axis.grid(axis="y", visible=False)
    return figure


def tail_curves(frame: DataFrame) -> Figure | None:
    """Draw the share of requests that take longer, of the setting where most tails are long.

    All runs' requests are together. The legend has the lines from the longest tail to the shortest.
    """
    if frame.empty:
        return None
    values = tails(frame)
    finite = values.where(values.map(math.isfinite))
    *setting, name = (finite.median(axis="columns") / finite.min(axis="columns")).fillna(1).idxmax()
    own = frame[(frame[RUN_SETTING] == setting).all(axis="columns")]
    own = own.sort_values(name, ascending=False)
    figure, (axis,) = _panels(1, 1, height=3.6, width=6.0)
    for method, histogram in zip(own["method"], own["histogram"], strict=True):
        latency, later = histogram.curve()
        kept = later > 0
        shares = later[kept] / histogram.total
        axis.plot(latency[kept], shares, color=colour(method), label=method, linewidth=1.6)
    _, batch, load, stragglers = setting
    images = "single images" if batch == 1 else f"requests of {batch} images"
    axis.set_title(f"{images}, load {load:.0%}, {stragglers}")
    axis.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="requests that take longer")
    axis.legend()
    return figure


def work_and_tail(frame: DataFrame) -> Figure | None:
    """Draw extra work against the tail over the lowest, the median of all settings."""
    if frame.empty:
        return None
    values = tails(frame)
    lowest = values.min(axis="columns")
    ratios = values.div(lowest.where(lowest.map(math.isfinite)), axis="index").median()
    return scatter(dict(ratios), dict(frame.groupby("method")["work"].mean()))


def scatter(ratios: Mapping[str, float], work: Mapping[str, float]) -> Figure:
    """Draw a labelled point for each method with a finite ratio.

    Args:
        ratios: of its tail to the lowest.
        work: in service times a query.
    """
    figure, (axis,) = _panels(1, 1, height=3.6, width=5.0)
    places = {
        m: (100 * (work[m] - 1), ratio) for m, ratio in ratios.items() if math.isfinite(ratio)
    }
    for method, place in places.items():
        axis.plot(*place, "o", color=colour(method))
    axis.set(xlabel="extra work, %", ylabel="tail, over the lowest of its place")
    axis.margins(0.15)
    label_points(figure, axis, places)
    return figure


SIDES = (
    ("left", "center", (7.0, 0.0)),
    ("right", "center", (-7.0, 0.0)),
    ("center", "bottom", (0.0, 6.0)),
    ("center", "top", (0.0, -6.0)),
)
"""Where a label may stand by its point: how it is aligned, and its offset in points."""


def label_points(figure: Figure, axis: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside their points, each on the first side that is free and within the axes."""
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    points = [
        Bbox.from_bounds(x - 5, y - 5, 10, 10)
        for x, y in map(axis.transData.transform, places.values())
    ]
    taken: list[Bbox] = []
    for number, (name, place) in enumerate(places.items()):
        others = [*taken, *points[:number], *points[number + 1 :]]
        found = []
        for across, up, offset in SIDES:
            style: dict[str, Any] = {"ha": across, "va": up, "fontsize": 8}
            text = axis.annotate(name, place, offset, textcoords="offset points", **style)
            box = text.get_window_extent()
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1)
            found.append((box.count_overlaps(others) + outside, text, box))
        _, best, box = min(found, key=lambda one: one[0])
        taken.append(box)
        for _, text, _ in found:
            if text is not best:
                text.remove()


def _panels(
    down: int, across: int, *, height: float, width: float = 3.4
) -> tuple[Figure, list[Axes]]:
    with plt.style.context(STYLE):
        size = (width * across, height * down)
        figure, axes = plt.subplots(
            down, across, figsize=size, squeeze=False, sharey=True, layout="constrained"
        )
    return figure, list(axes.flat)


def _save(rows_file: Path, figures: Mapping[str, Figure | None]) -> list[Path]:
    """Write and close figures, by name, as STEM-NAME.png beside a file of rows."""
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(rows_file.with_name(f"{rows_file.stem}-{name}.png"))
            write_picture(written[-1], figure)
            plt.close(figure)
    return written


def draw_accuracy(rows_file: Path) -> list[Path]:
    """Draw a file of rows of `bench accuracy` beside it; return what was written."""
    frame = accuracy_frame(read_rows(rows_file, "accuracy"))
    return _save(rows_file, {"late": accuracy_bars(frame)})


def draw_latency(rows_file: Path) -> list[Path]:
    """Draw a file of rows of `bench latency` beside it; return what was written."""
    frame = latency_frame(read_rows(rows_file, "latency"))
    return _save(rows_file, {"tail": tail_curves(frame), "work": work_and_tail(frame)})
