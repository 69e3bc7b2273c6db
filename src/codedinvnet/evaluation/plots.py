"""The picture of `bench accuracy`, from the frame of `tables`."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from pandas import DataFrame

from codedinvnet.codes.registry import OURS, known_method
from codedinvnet.evaluation.tables import on_f, shown_frame

STYLE = "seaborn-v0_8-whitegrid"


def accuracy_bars(frame: DataFrame) -> Figure | None:
    """Draw how often a late answer is right, a panel a data set, of the largest groups.

    All is on the bundle's f where that was measured. The dashed line is the accuracy of direct
    answers. Bounds and variants are left out.
    """
    one = on_f(frame[(frame["missing"] == 1) & (frame["corrupt"] == 0)])
    if one.empty:
        return None
    shown = [method is None or method.in_brief for method in map(known_method, one["method"])]
    one = one[shown]
    one = one[one["k"] == one["k"].max()]
    if one.empty:
        return None
    names, methods = list(one["dataset"].unique()), list(one["method"].unique())[::-1]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(
            ncols=len(names),
            figsize=(2.3 * len(names), 1.0 + 0.34 * len(methods)),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
    for axis, name in zip(axes.flat, names, strict=True):
        own = one[one["dataset"] == name].set_index("method").reindex(methods)
        bars = axis.barh(
            methods,
            own["recovered"],
            xerr=own["recovered ±"].fillna(0.0),
            color=["#cc3311" if method == OURS else "#4477aa" for method in methods],
        )
        texts = ["" if math.isnan(value) else f"{value:.1f}" for value in own["recovered"]]
        axis.bar_label(bars, texts, label_type="center", color="white", fontsize=8)
        for place, value in enumerate(own["recovered"]):
            if math.isnan(value):
                axis.text(2, place, "not measured", va="center", color="#777777", fontsize=7)
        axis.axvline(
            own["normal"].get(OURS, math.nan), color="#333333", linestyle="--", linewidth=1
        )
        axis.set(title=f"{name}, k = {one['k'].max()}", xlabel="late answers right, %")
        axis.set_xlim(0, 100)
        axis.grid(axis="y", visible=False)
    return figure


def draw_accuracy(rows_file: Path, compare: bool = False) -> list[Path]:
    """Draw a file of rows of `bench accuracy` next to it; return what was written."""
    figure = accuracy_bars(shown_frame(rows_file, compare))
    if figure is None:
        return []
    path = rows_file.with_name(f"{rows_file.stem}-late.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]
