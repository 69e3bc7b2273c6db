"""A map of which policy wins where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from pandas import DataFrame

from codedinvnet.files import write_picture
from codedinvnet.serving.policies import SERVED, in_order
from codedinvnet.simulation.sweep import NOBODY, lacks_intervals, winners

PALETTE = (
    "#777777",
    "#0072b2",
    "#e69f00",
    "#cc3311",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#999933",
    "#000000",
)
"""Told apart by colour-blind readers, too (after Okabe and Ito), in the order of SERVED."""
OTHER = "#332288"
PALE = 0.35


def colour(label: str) -> str:
    """Return a label's colour, the same in every picture; OTHER if PALETTE has none for it."""
    return dict(zip(SERVED, PALETTE, strict=False)).get(label, OTHER)


def draw_map(frame: DataFrame, path: Path) -> None:
    """Draw which policy wins under each kind of stragglers at each load, a panel a batch size.

    Contested places are pale.

    Args:
        frame: of a sweep.
        path: the picture.
    """
    best = winners(frame)
    models, loads = list(best["stragglers"].unique()), sorted(best["load"].unique())
    batches = sorted(best["batch"].unique())
    figure = Figure(
        figsize=(1.0 + 0.42 * len(loads) * len(batches), 1.3 + 0.3 * len(models)),
        layout="constrained",
    )
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for line in best[best["batch"] == batch].itertuples():
            axis.add_patch(
                Rectangle(
                    (loads.index(line.load), models.index(line.stragglers)),
                    1,
                    1,
                    facecolor="white" if line.policy == NOBODY else colour(line.policy),
                    edgecolor="white",
                    alpha=PALE if line.contested else 1.0,
                )
            )
        axis.set(xlim=(0, len(loads)), ylim=(len(models), 0))
        axis.set_xlabel("load: share of the workers' time")
        axis.set_xticks([i + 0.5 for i in range(len(loads))], [f"{x:.0%}" for x in loads])
        axis.set_yticks([i + 0.5 for i in range(len(models))], models)
        axis.tick_params(length=0, labelsize=8)
        title = "requests of one image" if batch == 1 else f"requests of {batch} images"
        axis.set_title(title, fontsize=9)
    handles = [Patch(color=colour(p), label=p) for p in in_order(best["policy"]) if p != NOBODY]
    within = "another policy comes within 5 %"
    pale = within if lacks_intervals(frame) else f"{within}, or intervals overlap"
    handles.append(Patch(color="#777777", alpha=PALE, label=f"pale: {pale}"))
    legend: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    title = "least work of the policies whose p99.9 is within 5 % of the lowest"
    figure.legend(handles=handles, title=title, title_fontsize=8, fontsize=8, **legend)
    write_picture(path, figure)
