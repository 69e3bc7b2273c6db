"""Two pictures of simulated policies: the tail of one place, and extra work against the tail."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from pandas import DataFrame

from codedinvnet.bench.plots import STYLE, scatter
from codedinvnet.files import write_picture
from codedinvnet.simulation import sweep
from codedinvnet.simulation.figures import latency_of
from codedinvnet.simulation.picture import colour

PLACE = ("pareto", 10)
"""Stragglers and images of a request, of the tail that is drawn."""
SHARES = {"p50_ms": 0.5, "p99_ms": 0.01, "p995_ms": 0.005, "p999_ms": 0.001}
"""Percentile of a row -> the share of requests that take longer."""


def draw_policies(path: Path) -> None:
    """Draw a sweep's rows as two pictures beside them."""
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
    ends = sorted(percentiles, key=lambda policy: percentiles[policy][-1])
    for place, policy in enumerate(ends):
        at = (0.55, 0.3 - 0.085 * place) if place < len(ends) - 1 else (0.86, 0.2)
        axis.text(*at, policy, color=colour(policy), transform=axis.transAxes)
    axis.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="requests that take longer")
    return figure


def work(frame: DataFrame) -> Figure:
    """Draw extra work against p99.9 over the lowest of its place, the geometric mean of places."""
    table = sweep.by_policy(frame)
    ratios = table.div(table.min(axis="columns"), axis="index")
    means = {policy: math.prod(ratios[policy]) ** (1 / len(ratios)) for policy in ratios}
    return scatter(means, dict(frame.groupby("policy")["work"].mean()))
