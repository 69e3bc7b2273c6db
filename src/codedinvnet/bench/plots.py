"""Figures of `bench accuracy`, made from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from codedinvnet.bench.papers import PUBLISHED
from codedinvnet.bench.tables import Line, best_bases, in_order, lines_of
from codedinvnet.codes.plain import Plain
from codedinvnet.codes.registry import METHODS, OURS
from codedinvnet.files import write_picture
from codedinvnet.rows import read_rows

COLOURS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
LOST_K = 10
"""Group size of the figures that show one: the hard case."""
MOST_CONFUSIONS = 4
BOUNDS = tuple(name for name, method in METHODS.items() if method.is_bound)
"""No rivals of a code: what nothing, twice the work, and a perfect encoder would give."""


def overall(line: Line, unavailability: float) -> float:
    """Return the overall accuracy when each worker is out with this probability.

    At most one worker of a group is taken to be out. A systematic code loses the answer of that
    worker alone: (1 − u)·normal + u·recovered. A group of a non-systematic code is decoded with
    one output less if any of its k + r workers is out, and all its answers suffer.

    Args:
        line: of a setting with one missing worker.
        unavailability: u, at most 1 / (k + r).
    """
    recovered = line.mean("recovered")
    normal = line.mean("normal" if line.systematic else "complete")
    if recovered is None or normal is None or (line.missing, line.corrupt) != (1, 0):
        raise ValueError("overall accuracy needs a setting with one missing worker")
    workers = line.k + int(line.rows[0]["r"])
    share = unavailability if line.systematic else workers * unavailability
    if not 0 <= workers * unavailability <= 1:
        raise ValueError(f"unavailability must lie in 0..1/{workers}, got {unavailability}")
    return (1 - share) * normal + share * recovered


def _colours(lines: Sequence[Line]) -> dict[str, tuple[float, float, float]]:
    """Return each label's colour: a method has the same one in every picture."""
    others = sorted({line.label for line in lines} - METHODS.keys())
    places = {label: place for place, label in enumerate([*METHODS, *others])}
    labels = sorted({line.label for line in lines}, key=lambda label: places[label])
    return {label: COLOURS[places[label] % len(COLOURS)] for label in labels}


def _panels(names: Sequence[str], height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(1.5 + 4.2 * len(names), height),
        squeeze=False,
        constrained_layout=True,
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Put one legend of all panels beside them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")


def against_k(lines: Sequence[Line]) -> Figure | None:
    """Draw recovered accuracy against k, a panel a data set, with the published figures hollow.

    Without a code it is the majority class's share; that is left out, since it would flatten the
    rest.
    """
    best = [
        line
        for line in best_bases(lines)
        if (line.missing, line.corrupt) == (1, 0) and line.label != Plain.name
    ]
    names = in_order(line.dataset for line in best)
    if not names:
        return None
    colours = _colours(best)
    figure, axes = _panels(names)
    for axis, name in zip(axes, names, strict=True):
        for label, colour in colours.items():
            points = sorted(
                ((x.k, x) for x in best if (x.dataset, x.label) == (name, label)),
                key=lambda pair: pair[0],
            )
            if points:
                axis.errorbar(
                    [k for k, _ in points],
                    [100 * (x.mean("recovered") or 0.0) for _, x in points],
                    [100 * (x.std("recovered") or 0.0) for _, x in points],
                    marker="o",
                    color=colour,
                    label=label,
                    linewidth=2.5 if label == OURS else 1.2,
                )
        for figure_ in PUBLISHED:
            if figure_.dataset == name:
                colour = colours.get(figure_.label, (0.4, 0.4, 0.4))
                axis.plot(
                    figure_.k,
                    figure_.recovered,
                    marker="s",
                    markerfacecolor="none",
                    color=colour,
                    linestyle="none",
                    label=f"{figure_.label}, published",
                )
        axis.set_xlabel("k, queries in a group")
        axis.set_xticks(sorted({x.k for x in best if x.dataset == name}))
    axes[0].set_ylabel("recovered accuracy, %")
    legend(figure, axes)
    return figure


def against_unavailability(lines: Sequence[Line]) -> Figure | None:
    """Draw overall accuracy against the share of workers that are out, a panel a data set."""
    best = [x for x in best_bases(lines) if (x.missing, x.corrupt, x.k) == (1, 0, LOST_K)]
    names = in_order(line.dataset for line in best)
    if not names:
        return None
    colours = _colours(best)
    figure, axes = _panels(names)
    for axis, name in zip(axes, names, strict=True):
        for line in (x for x in best if x.dataset == name):
            limit = 1 / (line.k + int(line.rows[0]["r"]))
            shares = np.linspace(0.0, limit, 20)
            axis.plot(
                100 * shares,
                [100 * overall(line, float(u)) for u in shares],
                color=colours[line.label],
                label=line.label,
                linewidth=2.5 if line.label == OURS else 1.2,
            )
        axis.set_xlabel("workers that are out, %")
    axes[0].set_ylabel(f"overall accuracy at k = {LOST_K}, %")
    legend(figure, axes)
    return figure


def confusions(lines: Sequence[Line]) -> Figure | None:
    """Draw which classes lost queries are taken for, data sets down and methods across.

    The methods are ours and the best rivals; the share of right answers is left out of each row,
    so that what is lost shows.
    """
    best = [
        line
        for line in best_bases(lines)
        if (line.missing, line.corrupt, line.k) == (1, 0, LOST_K) and line.label not in BOUNDS
    ]
    names = in_order(line.dataset for line in best)
    if not names:
        return None
    shown = {
        name: sorted(
            (x for x in best if x.dataset == name),
            key=lambda x: (x.label != OURS, -(x.mean("recovered") or 0.0)),
        )[:MOST_CONFUSIONS]
        for name in names
    }
    columns = max(len(found) for found in shown.values())
    figure, axes = plt.subplots(
        len(names),
        columns,
        figsize=(1.5 + 3.0 * columns, 0.6 + 3.2 * len(names)),
        squeeze=False,
        constrained_layout=True,
    )
    for row, name in zip(axes, names, strict=True):
        for axis in row:
            axis.set_axis_off()
        lost = [_lost_shares(line) for line in shown[name]]
        most = max(1.0, *(float(shares.max()) for shares in lost))
        for axis, line, shares in zip(row, shown[name], lost, strict=False):
            image = axis.imshow(shares, vmin=0, vmax=most, cmap="magma_r")
            axis.set_axis_on()
            axis.set_title(f"{name}: {line.label}", fontsize="small")
            axis.set_xlabel("answered", fontsize="x-small")
            classes = line.rows[0]["classes"]
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=6)
            axis.set_yticks(range(len(classes)), classes, fontsize=6)
        row[0].set_ylabel("true class", fontsize="x-small")
        figure.colorbar(image, ax=list(row), label="% of the true class", shrink=0.8)
    return figure


def _lost_shares(line: Line) -> np.ndarray:
    """Return % of each true class (rows) answered as each other one; 0 on the diagonal."""
    counts = np.sum([row["confusion"] for row in line.rows], axis=0, dtype=float)
    shares: np.ndarray = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0.0)
    return shares


FIGURES = {
    "k": against_k,
    "unavailability": against_unavailability,
    "confusion": confusions,
}


def write(rows_file: Path) -> list[Path]:
    """Draw the figures of a file of rows beside it, as STEM-NAME.png; return what was written."""
    lines = lines_of(read_rows(rows_file, "accuracy"))
    return save_beside(rows_file, {name: draw(lines) for name, draw in FIGURES.items()})


def save_beside(rows_file: Path, figures: Mapping[str, Figure | None]) -> list[Path]:
    """Write and close figures, by name, as STEM-NAME.png beside a file of rows."""
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = rows_file.with_name(f"{rows_file.stem}-{name}.png")
            write_picture(path, figure)
            plt.close(figure)
            written.append(path)
    return written
