"""`python -m benchmarks frontier`: how codable a network f is against how accurate.

A frontier file has the settings of one training as its `base`, and `points` that change its
network, or more of it. Every point is scored on validation images: the direct answers of f and g,
and those decoded at the largest group size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pandas import DataFrame
from pydantic import Field

from codedinvnet.codes.equal_cost import macs
from codedinvnet.common import grid
from codedinvnet.common.config import Section, Settings, parse_settings, validated
from codedinvnet.common.files import check_writable, read_json
from codedinvnet.evaluation import stages, tables
from codedinvnet.models.bundle import load_bundle
from codedinvnet.training.loop import LATEST

KIND = "frontier"
"""The experiment of the rows."""
PLACE = ["dataset", "f"]
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
"""Of the picture's logarithmic scale, in points."""


class Frontier(Section):
    """The contents of a frontier file."""

    base: Settings
    points: Annotated[dict[str, dict[str, dict[str, Any]]], Field(min_length=1)]
    """Name -> section -> what of it the point changes."""

    def settings(self, where: str) -> Iterator[tuple[str, dict[str, Any], Settings]]:
        """Yield every point's name, its settings as the file has them, and whole."""
        base = self.base.model_dump(mode="json", exclude_unset=True)
        for name, changes in self.points.items():
            changed = {section: base.get(section, {}) | own for section, own in changes.items()}
            folder = re.sub(r"[^\w.]+", "-", f"{self.base.name}-{name}")
            made = {**base, **changed, "name": folder}
            yield name, made, parse_settings(made, f"{where}: points.{name}")


def measure(run: stages.Run) -> dict[str, Any]:
    """Train a point, finished epochs kept, and return its figures on validation images."""
    members = run.settings.fusion.members
    alone = stages.train(run)["validation"]["validation_accuracy"]
    found = stages.fuse(run, members)
    bundle = load_bundle(found["bundle"])
    return {
        "macs": macs(bundle.model.network, bundle.model),
        "alone": round(alone, 6),
        "normal": round(found["validation_normal"], 6),
        "recovered": round(found[f"validation_recovered_k{members}"], 6),
        "training_seconds": bundle.info.provenance.seconds,
    }


def run(
    *,
    points: Path,
    out: Path,
    only: Sequence[str] = (),
    data_dir: Path | None = None,
    save_dir: Path = Path("runs"),
) -> dict[str, Any]:
    """Train the points that have no row yet, and return the table of all rows.

    Args:
        points: a frontier file.
        out: the rows.
        only: words `KEY=VALUE`, such as `f=i-RevNet`, that points must fit.
        data_dir: where the image sets lie.
        save_dir: where trainings are kept.
    """
    frontier = validated(Frontier, read_json(points, "the frontier"), points)
    named = [
        ({"dataset": settings.data.name, "f": name}, made, settings)
        for name, made, settings in frontier.settings(str(points))
    ]
    check_writable(out)
    cells = []
    for place, made, settings in grid.select(named, only, lambda one: one[0]):
        training = stages.Run(settings, save_dir, data_dir, torch.device("cpu"), resume=LATEST)
        depends = {key: value for key, value in made.items() if key != "name"}
        cells.append(grid.Cell(KIND, place, depends, partial(measure, training), place["f"]))
    grid.resume(cells, out)
    rows = grid.read_rows(out, KIND)
    return {"rows": rows, "table": table(rows)}


def frame(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Return the points in %, the most accurate first."""
    found = grid.latest(rows, PLACE)
    shares = ["alone", "normal", "recovered"]
    found[shares] = 100 * found[shares].astype(float)
    found["lost"] = found["normal"] - found["recovered"]
    return found.sort_values("normal", ascending=False, ignore_index=True)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of all points."""
    found = frame(rows)
    columns = {
        "f": found["f"],
        "multiply-adds": (found["macs"].astype(float) / 1e6).map("{:.1f} M".format),
        "f alone": found["alone"],
        "direct": found["normal"],
        "recovered": found["recovered"],
        "lost to decoding": found["lost"],
    }
    return tables.markdown(DataFrame(columns), dict.fromkeys(list(columns)[2:], ".2f"))


def page(path: Path) -> str:
    """Return the table of a file of rows."""
    return table(grid.read_rows(path, KIND))


def draw(path: Path, picture: Path) -> None:
    """Draw what decoding loses, on a logarithmic scale, over the accuracy of direct answers."""
    from matplotlib.figure import Figure

    found = frame(grid.read_rows(path, KIND))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for point in found.itertuples():
        bounded = str(point.f).startswith("i-ResNet")
        axes.plot(point.normal, point.lost, "o", color="#1a56c4" if bounded else "#c4501a")
        text: dict[str, Any] = {"xytext": (7, -4), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(str(point.f), (point.normal, point.lost), **text)
    low, high = found["normal"].min(), found["normal"].max()
    axes.set_xlim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.8 * found["lost"].min(), 1.25 * found["lost"].max())
    axes.set_xlabel("direct answers right, % (better to the right)")
    axes.set_ylabel("points lost to decoding (better below)")
    figure.suptitle("Fashion-MNIST, one of ten answers missing, validation images", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
