"""Tables and the picture that the documents show of the rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.peers.contenders import CONTENDERS
from codedinvnet.evaluation.grid import read_rows

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
}
FIRST = ("none", "pareto", "slow", "held", "silent")
"""Faults that README shows."""
SITUATION = ["fault", "load", "servers", "slots", "bursty"]
CLOSE = 1.1
"""What is at most so many times the best figure is level with it."""


def read(path: Path) -> pd.DataFrame:
    """Return the finished trials of a file, a row each."""
    rows = [row for row in read_rows(path, "peers") if row["error"] is None]
    return pd.DataFrame(rows, columns=None if rows else [*SITUATION, "peer", "seed", "p99.9"])


def reported(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that tables show: those that are in no sweep."""
    return rows[rows.seed != SWEEP_SEED]


def _cell(values: pd.Series, best: float) -> str:
    """Return the median of a cell and its range over seeds; bold if level with the best."""
    if values.empty:
        return ""
    text = f"{values.median():.0f}"
    text = f"**{text}**" if values.median() <= CLOSE * best else text
    return text + (f" ({values.min():.0f}–{values.max():.0f})" if len(values) > 1 else "")


def table(rows: pd.DataFrame, figure: str = "p99.9") -> str:
    """Return a Markdown table of a figure: a line a situation, a column a contender."""
    found = reported(rows)
    names = [name for name in CONTENDERS if name in set(found.peer)]
    lines = [f"| fault, load | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for key, group in found.groupby(SITUATION, sort=False):
        fault, load, servers, slots, bursty = key
        told = f"{fault}, {100 * load:.0f} %"
        told += f", {servers} servers" if servers != 8 else ""
        told += f", {slots} slots" if slots != 1 else ""
        told += ", bursts" if bursty else ""
        cells = [group[group.peer == name][figure] for name in names]
        best = min(values.median() for values in cells if len(values))
        lines.append(f"| {told} | {' | '.join(_cell(values, best) for values in cells)} |")
    return "\n".join(lines)


def _usual(path: Path) -> pd.DataFrame:
    """Return the rows of README's situation: eight servers, one slot, 40 % busy, Poisson."""
    rows = reported(read(path))
    usual = (rows.load == 0.4) & (rows.servers == 8) & (rows.slots == 1) & ~rows.bursty
    return rows[usual & rows.fault.isin(FIRST)]


def readme(path: Path) -> str:
    """Return README's table: a line a contender, a column a fault."""
    rows = _usual(path)
    faults = [fault for fault in FIRST if fault in set(rows.fault)]
    lines = [
        f"| p99.9, ms | {' | '.join(FAULTS[fault] for fault in faults)} |",
        "| --- |" + " --- |" * len(faults),
    ]
    best = {f: rows[rows.fault == f].groupby("peer")["p99.9"].median().min() for f in faults}
    for name in CONTENDERS:
        if name in set(rows.peer):
            mine = rows[rows.peer == name]
            cells = [_cell(mine[mine.fault == fault]["p99.9"], best[fault]) for fault in faults]
            lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
