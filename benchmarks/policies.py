"""Simulated policies: a table to choose by, and pictures of a tail and of what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from pandas import DataFrame, Series

from benchmarks.bundles import BUNDLES, HARD
from codedinvnet.codes.registry import find_method
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.plots import STYLE
from codedinvnet.files import write_picture
from codedinvnet.rows import read_rows
from codedinvnet.scheduler.policies import UNCODED
from codedinvnet.serving.policies import served_as
from codedinvnet.simulation import sweep
from codedinvnet.simulation.figures import QUANTILES, latency_of
from codedinvnet.simulation.picture import colour

PLACE = ("pareto", 10)
"""Stragglers and images of a request, of the tail that is drawn."""
SHARES = {f"{name}_ms": round(1 - share, 6) for name, share in QUANTILES.items()}
"""Percentile of a row -> the share of requests that take longer."""
CHOICE = ("auto", "hedge", "small-backup", "small-backup+hedge", "coded")
"""The policies of the table to choose by."""
APPROXIMATE = "approximate answers, %"
"""The column of the share of answers that are approximate."""


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return simulated p99.9 in ms of the policies, a column for each place.

    An interval stands behind p99.9 where the run was long enough for one. The last columns have
    work and the share of approximate answers, from the least of all places to the most.
    """
    frame = sweep.frame_of(rows)
    late, low, high = (sweep.by_policy(frame, name).T for name in ("p999", "low", "high"))
    texts = late.map("{:.0f}".format) + (
        " (" + low.map("{:.0f}".format) + "–" + high.map("{:.0f}".format) + ")"
    ).where(low.notna(), "")
    texts.columns = [f"{Path(model).stem}, {batch}" for model, batch, _ in late.columns]
    work = frame.groupby("policy")["work"].agg(["min", "max"])
    texts["work"] = [f"{low:.2f} to {high:.2f}" for low, high in work.loc[late.index].to_numpy()]
    texts[APPROXIMATE] = approximate(frame).loc[late.index]
    return tables.markdown(texts.reset_index(names="policy"))


def by_load(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return simulated p99.9 in ms: a line for each straggler model, a column for each load."""
    late = sweep.by_policy(sweep.frame_of(rows)).unstack("load").map("{:.0f}".format)
    columns = sorted(late.columns, key=lambda column: column[1])
    late = late[columns].droplevel("batch")
    late.columns = [f"{policy}, {load:.0%}" for policy, load in columns]
    return tables.markdown(late.rename(index=str).reset_index(names="p99.9, ms"))


def by_place(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return simulated p99.9 in ms: a line for each place, a column for each policy.

    The last lines have what the policies cost in all places, from the least to the most.
    """
    frame = sweep.frame_of(rows)
    late = sweep.by_policy(frame).droplevel("load").map("{:.0f}".format)
    lines = [
        {"p99.9, ms": f"{model}; {batch} image{'s' if batch > 1 else ''}", **dict(line)}
        for (model, batch), line in late.iterrows()
    ]
    work = frame.groupby("policy")["work"].agg(["min", "max"])
    spent = {policy: f"{low:.2f} to {high:.2f}" for policy, (low, high) in work.T.items()}
    lines += [
        {"p99.9, ms": "work", **spent},
        {"p99.9, ms": APPROXIMATE, **approximate(frame)},
    ]
    return tables.markdown(DataFrame(lines))


def approximate(frame: DataFrame) -> Series:
    """Return by policy which share of answers is approximate, from the least place to the most."""
    shares = 100 * frame.groupby("policy")["approximate"].agg(["min", "max"])
    texts = [f"{low:.1f} to {high:.1f}" if high else "none" for low, high in shares.to_numpy()]
    return Series(texts, index=shares.index)


def percents(shares: Iterable[float | None]) -> str:
    """Return shares of an image set each, "–" for what was not measured."""
    return ", ".join("–" if share is None else f"{share:.1f}" for share in shares)


def choice(folder: Path, k: int = HARD) -> str:
    """Return what policies gain and cost: the tail, work, approximate answers, and training.

    The tail is p99.9 over that of `uncoded`: the geometric mean of all places, and its range. Late
    answers are of the image sets whose bundles ship, each policy on the base model on which most of
    its answers are right, late or not; what was not measured is "–".
    """
    if not (folder / "policies.jsonl").is_file() or not (folder / "accuracy.jsonl").is_file():
        return ""
    frame = sweep.frame_of(sweep.read_rows(folder / "policies.jsonl"))
    accuracy = tables.accuracy_frame(read_rows(folder / "accuracy.jsonl", "accuracy"))
    here = (accuracy["k"] == k) & (accuracy["missing"] == 1) & (accuracy["corrupt"] == 0)
    direct = accuracy[here].groupby("dataset")["normal"].max()
    names = [name for name in BUNDLES if name in direct]
    late = sweep.by_policy(frame)
    ratios = late.div(late[UNCODED.name], axis="index")
    work = 100 * (frame.groupby("policy")["work"].agg(["min", "max"]) - 1)
    made_up, most = approximate(frame), frame.groupby("policy")["approximate"].max()
    lines = []
    for policy in CHOICE:
        served, own = served_as(policy), ratios[policy]
        method = find_method(served.method)
        exact = not served.by_name and not served.rules.coded
        best = tables.best_bases(accuracy[here], most[policy]).set_index(["method", "dataset"])
        late_right, direct_right = (
            [direct[n] if exact else best[column].get((served.method, n)) for n in names]
            for column in ("recovered", "normal")
        )
        trained = "f, g and E" if method.of_bundle else "a small network"
        mean = math.prod(own) ** (1 / len(own))
        lines.append(
            {
                "policy": f"`{policy}`",
                "p99.9, without = 1": f"{mean:.2f} ({own.min():.2f} to {own.max():.2f})",
                "extra work, %": "{:.1f} to {:.1f}".format(*work.loc[policy]),
                APPROXIMATE: made_up[policy],
                f"late answers right, %: {', '.join(names)}": percents(late_right),
                "direct answers right, %": percents(direct_right),
                "to be trained": "nothing" if exact else trained,
            }
        )
    return tables.markdown(DataFrame(lines))


def draw(path: Path) -> None:
    """Draw the rows of a study as two pictures beside them."""
    rows = list(sweep.read_rows(path))
    here = {
        row["cell"]["policy"]: [latency_of(row[name]) for name in SHARES]
        for row in rows
        if (row["cell"]["stragglers"], row["cell"]["batch"]) == PLACE
    }
    with plt.style.context(STYLE):
        pictures = {"tail": tail(here), "work": work(sweep.frame_of(rows))}
    for name, figure in pictures.items():
        write_picture(path.with_name(f"{path.stem}-{name}.png"), figure)
        plt.close(figure)


def tail(percentiles: dict[str, list[float]]) -> Figure:
    """Draw the share of requests that take longer than a time, a labelled line a policy."""
    figure, axis = plt.subplots(figsize=(6.0, 3.4), layout="constrained")
    for policy, times in percentiles.items():
        axis.plot(times, list(SHARES.values()), "o-", color=colour(policy), markersize=4)
    ends = sorted(percentiles, key=lambda policy: -percentiles[policy][-1])
    for place, policy in enumerate(ends):
        end = (percentiles[policy][-1], SHARES["p999_ms"])
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": colour(policy),
            "linewidth": 0.6,
            "relpos": (0, 0.5),
        }
        at = (0.62, 0.4 - 0.06 * place) if place else (0.82, 0.46)
        style: dict[str, Any] = {"color": colour(policy), "va": "center", "fontsize": 9}
        arrow = line if place else None
        axis.annotate(policy, end, at, textcoords="axes fraction", arrowprops=arrow, **style)
    axis.set_ylim(1e-4, 1)
    axis.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="requests that take longer")
    return figure


def work(frame: DataFrame) -> Figure:
    """Draw extra work against p99.9 over the lowest of its place, the geometric mean of places."""
    table = sweep.by_policy(frame)
    ratios = table.div(table.min(axis="columns"), axis="index")
    means = {policy: math.prod(ratios[policy]) ** (1 / len(ratios)) for policy in ratios}
    return scatter(means, dict(frame.groupby("policy")["work"].mean()))


def scatter(ratios: Mapping[str, float], work: Mapping[str, float]) -> Figure:
    """Draw a labelled point for each method with a finite ratio.

    Args:
        ratios: of its tail to the lowest.
        work: in service times a query.
    """
    figure, axis = plt.subplots(figsize=(5.0, 3.6), layout="constrained")
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
