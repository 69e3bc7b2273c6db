"""Pictures: the map of p99.9 by load for each policy and straggler model; and a fit of times."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from codedinvnet.errors import UserError
from codedinvnet.files import write_picture
from codedinvnet.serving.policies import SERVED, in_order
from codedinvnet.simulation.sweep import BASELINE, NOBODY, Cell, winners

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


def colour(label: str) -> str:
    """Return a label's colour: it has the same one in every picture."""
    return dict(zip(SERVED, PALETTE, strict=True)).get(label, OTHER)


FORMATS = (".png", ".pdf", ".svg")


def check_format(path: Path) -> None:
    """Refuse a file that no picture can be drawn into.

    Raises:
        UserError: if its name ends in none of FORMATS.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--picture: {path} does not end in one of {', '.join(FORMATS)}")


def draw_map(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one panel for each straggler model and batch size; a strip below shows the winner.

    Args:
        rows: of a sweep.
        path: its ending is one of FORMATS.
    """
    cells = {Cell(**row["cell"]): row for row in rows}
    models = list(dict.fromkeys(cell.stragglers for cell in cells))
    batches = sorted({cell.batch for cell in cells})
    policies = in_order(cell.policy for cell in cells)
    best = winners(rows)
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False}):
        width, height = 3.4 * len(batches) + 0.6, 1.8 * len(models) + 1.0
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(len(models), len(batches), squeeze=False, sharex=True)
        for axis, (model, batch) in zip(axes.flat, itertools.product(models, batches), strict=True):
            own = {c: row for c, row in cells.items() if (c.stragglers, c.batch) == (model, batch)}
            if not own:
                axis.set_axis_off()
                continue
            _panel(axis, own, policies)
            _strip(axis, {c.load: best[model, batch, c.load] for c in own})
            images = "single images" if batch == 1 else f"requests of {batch}"
            axis.set_title(f"{model}, {images}", fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("load, share of capacity")
        figure.supylabel("p99.9 (ms)", fontsize=8)
        figure.suptitle("Simulated p99.9 by load; the strip shows which policy wins", fontsize=9)
        handles = [Patch(color=colour(policy), label=policy) for policy in policies]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2 * len(batches), frameon=False
        )
        write_picture(path, figure)


def _panel(axis: Any, own: Mapping[Cell, Mapping[str, Any]], policies: Sequence[str]) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    for policy in policies:
        line = sorted(
            ((c.load, row) for c, row in own.items() if c.policy == policy), key=lambda at: at[0]
        )
        loads = [load for load, _ in line]
        values = [np.nan if row["p999_ms"] is None else row["p999_ms"] for _, row in line]
        style = "--" if policy == BASELINE else "-"
        axis.plot(loads, values, style, color=colour(policy), marker=".", markersize=4)
        for load, row in line:
            if row["p999_ms"] is not None and row["p999_ms_95"] is not None:
                low, high = row["p999_ms_95"]
                # The axis is logarithmic, and intervals of older rows reach below 0.
                bounds = [max(low, 0.1 * row["p999_ms"]), high]
                axis.plot([load, load], bounds, color=colour(policy), linewidth=0.8)
    axis.grid(axis="y", linewidth=0.3, alpha=0.5)


def _strip(axis: Any, winner: Mapping[float, str]) -> None:
    loads = sorted(winner)
    edges = [(a + b) / 2 for a, b in itertools.pairwise(loads)]
    first = loads[0] - (edges[0] - loads[0] if edges else 0.05)
    last = loads[-1] + (loads[-1] - edges[-1] if edges else 0.05)
    bounds = [first, *edges, last]
    for load, (left, right) in zip(loads, itertools.pairwise(bounds), strict=True):
        if winner[load] == NOBODY:
            continue
        axis.axvspan(left, right, 0, 0.045, color=colour(winner[load]), linewidth=0)
    axis.set_xlim(first, last)


def draw_fit(measured: np.ndarray, drawn: np.ndarray, path: Path) -> None:
    """Draw the share of tasks that took longer than a time, as measured and as fitted.

    Args:
        measured: (n,) in ms.
        drawn: (m,) in ms.
        path: its ending is one of FORMATS.
    """
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for times, words, style in ((drawn, "fitted", "-"), (measured, "measured", ".")):
        ordered = np.sort(times)
        longer = 1 - (np.arange(len(ordered)) + 0.5) / len(ordered)
        axis.plot(ordered, longer, style, label=words, markersize=3)
    axis.set(xscale="log", yscale="log", xlabel="ms", ylabel="share of tasks that took longer")
    axis.grid(linewidth=0.3, alpha=0.5)
    axis.legend(frameon=False)
    write_picture(path, figure)
