"""Tables and the picture that the documents show of the rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from codedinvnet.common.grid import read_rows
from codedinvnet.evaluation.tables import markdown

SWEEP_SEED = 101
"""Seed of the sweeps, which no reported cell has."""
TITLES = {
    "envoy-round-robin": "Envoy, round robin",
    "envoy-least-request": "Envoy, least request",
    "envoy-hedge": "Envoy, hedging, tuned for each fault",
    "haproxy-leastconn": "HAProxy, `leastconn`, `maxconn`",
    "haproxy-round-robin": "HAProxy, round robin",
    "nginx": "nginx, `least_conn`",
    "ours-uncoded": "this gateway, without hedging",
    "ours-hedge": "**this gateway, hedging**",
    "ours-hedge-slots": "this gateway, hedging, told its slots",
    "ours-fallback": "this gateway, with a fallback",
    "ours-httpx": "`codedinvnet.hedging` in the client",
    "httpx-hedged": "httpx-hedged, servers in turn",
    "hedge-python": "hedge-python, servers in turn",
}
FAULTS = {
    "none": "nothing wrong",
    "pareto": "1 % of requests block their server",
    "slow": "one server 10 × slower",
    "held": "1 % of answers held back",
    "silent": "one server silent 5 s of every 10",
    "exponential": "exponential service times",
    "lognormal": "lognormal service times",
    "sizes": "a tenth of the requests 20 × longer",
    "all-slow": "all servers 3 × slower, 1 s of every 5",
    "killed": "one server killed, then back",
    "refused": "one server refuses connections",
    "garbage": "one server answers 503",
    "stopped": "servers' processes stop, now one, now another",
}
FIRST = ("none", "pareto", "slow", "held", "silent")
"""Faults that README shows."""
SITUATION = ["fault", "load", "servers", "slots", "bursty", "kind"]
COLUMNS = [*SITUATION, "peer", "seed", "p99.9"]
KINDS = {"streams": "streams", "onnx": "ONNX Runtime", "triton": "Triton"}
LIMITS = {"p50": 1.15, "p90": 1.15, "p99": 1.1, "p99.9": 1.1}
"""Percentile -> what is at most so many times HAProxy's is level with it."""
CLOSE = 1.1
"""What is at most so many times the best figure is level with it."""


def read(path: Path) -> pd.DataFrame:
    """Return the finished trials of a file, a row each."""
    rows = [row for row in read_rows(path, "peers") if row["error"] is None]
    return pd.DataFrame(rows, columns=None if rows else COLUMNS)


def reported(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that tables show: those that are in no sweep."""
    return rows[rows.seed != SWEEP_SEED]


def _cells(rows: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """Return p99.9 as text, a row for each place and a column for each contender.

    It is the median and, of several seeds, the range; bold if level with the place's best.
    """
    found = rows.groupby([*place, "peer"], sort=False)["p99.9"].agg(
        ["median", "min", "max", "size"]
    )
    best = found.groupby(place, sort=False)["median"].transform("min")
    texts = []
    for line, least in zip(found.itertuples(), best, strict=True):
        text = f"{line.median:.0f}"
        text = f"**{text}**" if line.median <= CLOSE * least else text
        texts.append(text + (f" ({line.min:.0f}–{line.max:.0f})" if line.size > 1 else ""))
    table = pd.Series(texts, found.index).unstack("peer", sort=False)
    return table[[name for name in TITLES if name in table]]


def table(rows: pd.DataFrame) -> str:
    """Return the table of p99.9: a line for each situation, a column for each contender."""
    cells = _cells(reported(rows), SITUATION)
    told = [
        f"{fault}, {100 * load:.0f} %"
        + (f", {servers} servers" if servers != 8 else "")
        + (f", {slots} slots" if slots != 1 else "")
        + (", bursts" if bursty else "")
        + (f", {KINDS[kind]}" if kind != "timed" else "")
        for fault, load, servers, slots, bursty, kind in cells.index
    ]
    cells.insert(0, "fault, load", told)
    return markdown(cells).strip()


def summary(rows: pd.DataFrame) -> str:
    """Return in how many situations our gateway is level with the best, and with HAProxy."""
    peers = {"ours-hedge", "haproxy-leastconn"}
    if not peers <= {*rows.peer}:
        return ""
    columns = [*LIMITS, "work", "goodput"]
    medians = reported(rows).groupby([*SITUATION, "peer"], sort=False)[columns].median()
    best = medians["p99.9"].groupby(SITUATION, sort=False).min()
    ours, queue = (medians.xs(name, level="peer") for name in ("ours-hedge", "haproxy-leastconn"))
    level = int((ours["p99.9"] <= CLOSE * best.loc[ours.index]).sum())
    both = ours.index.intersection(queue.index)
    ours, queue = ours.loc[both], queue.loc[both]
    close = {name: int((ours[name] <= most * queue[name]).sum()) for name, most in LIMITS.items()}
    ratios = [f"{name} at most {LIMITS[name]:g} times in {count}" for name, count in close.items()]
    told = (
        f"In {level} of {len(best)} situations the gateway's p99.9 is the lowest or within 10 % "
        f"of it. Compared with HAProxy, of {len(both)}: {', '.join(ratios)}."
    )
    copied = ours[(ours.index.get_level_values("fault") != "garbage") & (ours.work > 0)].work - 1
    if len(copied):
        mean, most = 100 * copied.mean(), 100 * copied.max()
        told += f" Copies add {mean:.1f} % of requests on average, {most:.1f} % at most."
    over = ours.index.get_level_values("load") > 1
    if over.any():
        least = (ours.goodput / queue.goodput)[over].min()
        told += f" Above capacity its goodput is at least {least:.2f} times HAProxy's."
    return told


def _usual(path: Path) -> pd.DataFrame:
    """Return the rows of README's situation: eight servers, one slot, 40 % busy, Poisson."""
    rows = reported(read(path))
    usual = (rows.load == 0.4) & (rows.servers == 8) & (rows.slots == 1) & ~rows.bursty
    return rows[usual & rows.fault.isin(FIRST) & (rows.kind == "timed")]


def readme(path: Path) -> str:
    """Return README's table: a line for each contender, a column for each fault."""
    cells = _cells(_usual(path), ["fault"]).T
    cells = cells[[fault for fault in FIRST if fault in cells]].rename(columns=FAULTS)
    return markdown(cells.rename(index=TITLES).reset_index(names="p99.9, ms")).strip()


def draw(path: Path, picture: Path) -> None:
    """Draw p99.9 of every contender when requests block their servers."""
    from matplotlib.figure import Figure

    rows = _usual(path)
    medians = rows[rows.fault == "pareto"].groupby("peer")["p99.9"].median()
    medians = medians.sort_values(ascending=False)
    figure = Figure(figsize=(7, 0.45 * len(medians) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [TITLES[name].replace("`", "").replace("**", "") for name in medians.index]
    colours = ["#1a56c4" if name.startswith("ours") else "#9aa0a6" for name in medians.index]
    bars = axes.barh(names, medians.to_numpy(), color=colours)
    axes.bar_label(bars, [f"{value:.0f} ms" for value in medians], padding=4)
    axes.set_xlim(0, 1.15 * float(medians.max()))
    axes.set_xlabel("p99.9 in milliseconds")
    figure.suptitle("1 % of requests block their server; servers 40 % busy", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
