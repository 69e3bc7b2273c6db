"""Tables and the picture that the documents show of the rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.peers.contenders import CONTENDERS, EXAMPLE, VLLM_ROUTER
from benchmarks.stale import note
from codedinvnet.common.grid import key_of, latest, read_rows
from codedinvnet.evaluation.tables import markdown

SWEEP_SEED = 101
"""Seed of the sweeps, which no reported cell has."""
TITLES = {
    "envoy-least-request": "Envoy, least request",
    "envoy-hedge": "Envoy, hedging, tuned for each fault",
    "haproxy-leastconn": "HAProxy, `leastconn`, `maxconn`",
    "haproxy-timeout": "HAProxy, `timeout server` tuned for each fault",
    "nginx": "nginx, `least_conn`",
    "vllm-router": "vllm-router, `power_of_two`",
    "ours-uncoded": "this gateway, without hedging",
    "ours-hedge": "**this gateway, hedging**",
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
    "antagonists": "other clients take 40 % of every second server",
    "killed": "one server killed, then back",
    "refused": "one server refuses connections",
    "garbage": "one server answers 503",
    "stopped": "servers' processes stop, now one, now another",
}
RIVALS = [name for name, one in CONTENDERS.items() if one.program]
"""All contenders but this gateway."""
FIRST = ("none", "pareto", "slow", "held", "silent")
"""Faults that README shows."""
SITUATION = ["fault", "load", "servers", "slots", "bursty", "kind", "instances"]
KINDS = {"streams": "streams", "onnx": "ONNX Runtime", "unnamed": "unnamed route"}
MEASURE = "python -m benchmarks peers --out docs/results/peers.jsonl"
MEASURE_SEVERAL = "python -m benchmarks peers --several --out docs/results/several.jsonl"
SEVERAL = {
    "ours-members": "members",
    "ours-hedge": "gateways that decide alone",
    "haproxy-leastconn": "HAProxy",
    "envoy-least-request": "Envoy",
}
"""Contenders of which several instances are measured."""
SHOWN = {"envoy-hedge": "yaml", "haproxy-timeout": "text", "nginx": "text"}
"""Contenders whose configurations are printed, and in which language."""
LIMITS = {"p50": 1.15, "p90": 1.15, "p99": 1.1, "p99.9": 1.1}
"""Percentile -> what is at most so many times HAProxy's is level with it."""
CLOSE = 1.1
"""What is at most so many times the best figure is level with it."""


def read(path: Path) -> pd.DataFrame:
    """Return the newest finished trials of a file, a row each."""
    rows = [{"instances": 1, **row} for row in read_rows(path, "peers")]
    swept = [row for row in rows if row["seed"] == SWEEP_SEED]
    rest = [row for row in rows if row["seed"] != SWEEP_SEED]
    place = [*SITUATION, "peer", "seed"]
    found = [latest(swept, [*place, "tuning"]), latest(rest, place, ["seed"])]
    return pd.concat([frame for frame in found if len(frame)] or found[:1], ignore_index=True)


def reported(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that tables show: those that are in no sweep."""
    return rows[rows.seed != SWEEP_SEED]


def _is_stale(row: pd.Series) -> bool:
    return bool(row["version"] != key_of(CONTENDERS[row["peer"]].settings))


def stale(rows: pd.DataFrame, command: str = MEASURE) -> str:
    """Return which rows are of a configuration that is not today's, and what makes them again."""
    old = sorted({row["peer"] for _, row in rows.iterrows() if _is_stale(row)})
    names = ", ".join(f"`{name}`" for name in old)
    return note(f"rows of {names} are of an older configuration", command) if old else ""


def _cells(rows: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """Return p99.9 as text, a row for each place and a column for each contender.

    It is the median and, of several seeds, the range, and the median share of errors if there are
    any; bold if level with the best of a place where a rival was measured.
    """
    rows = rows.assign(failed=100 * rows.errors / rows.requests)
    groups = rows.groupby([*place, "peer"], sort=False)
    found = groups["p99.9"].agg(["median", "min", "max", "size"])
    found["failed"] = groups["failed"].median()
    found["rival"] = found.index.isin(RIVALS, level="peer")
    best = found.groupby(place, sort=False)[["median", "failed"]].transform("min")
    best["rival"] = found.groupby(place, sort=False)["rival"].transform("any")
    texts = []
    for line, least in zip(found.itertuples(), best.itertuples(), strict=True):
        text = f"{line.median:.0f}"
        is_level = line.median <= CLOSE * least.median and line.failed <= CLOSE * least.failed
        text = f"**{text}**" if is_level and least.rival else text
        text += f" ({line.min:.0f}–{line.max:.0f})" if line.size > 1 else ""
        texts.append(text + (f", {line.failed:.2g} % failed" if line.failed else ""))
    table = pd.Series(texts, found.index).unstack("peer", sort=False)
    return table[[name for name in TITLES if name in table]]


def table(rows: pd.DataFrame) -> str:
    """Return the table of p99.9: a line for each situation, a column for each contender."""
    cells = _cells(reported(rows), SITUATION)
    cells.insert(0, "fault, load", [_told(*situation) for situation in cells.index])
    return f"{markdown(cells).strip()}\n\n{stale(rows)}".strip()


def _told(
    fault: str, load: float, servers: int, slots: int, bursty: bool, kind: str, instances: int
) -> str:
    """Return a situation in words."""
    return (
        f"{fault}, {100 * load:.0f} %"
        + (f", {servers} servers" if servers != 8 else "")
        + (f", {slots} slots" if slots != 1 else "")
        + (", bursts" if bursty else "")
        + (f", {KINDS[kind]}" if kind != "timed" else "")
        + (f", {instances} instances" if instances > 1 else "")
    )


def summary(rows: pd.DataFrame) -> str:
    """Return in how many situations our gateway is level with the best, and where it is not.

    Situations without a rival don't count, and nothing does while rows of rivals are stale.
    """
    if old := stale(rows):
        return f"Not counted yet.\n\n{old}"
    peers = {"ours-hedge", "haproxy-leastconn"}
    if not peers <= {*rows.peer}:
        return ""
    columns = [*LIMITS, "work", "goodput"]
    medians = reported(rows).groupby([*SITUATION, "peer"], sort=False)[columns].median()
    found = medians["p99.9"].unstack("peer", sort=False)
    found = found[found.filter(RIVALS).notna().any(axis=1) & found["ours-hedge"].notna()]
    ratios = found["ours-hedge"] / found.min(axis=1)
    best = found.idxmin(axis=1)
    lost = [
        f"{_told(*where)} ({ratio:.2f} times `{best[where]}`)"
        for where, ratio in ratios[ratios > CLOSE].sort_values(ascending=False).items()
    ]
    ours, queue = (medians.xs(name, level="peer") for name in ("ours-hedge", "haproxy-leastconn"))
    both = ours.index.intersection(queue.index)
    ours, queue = ours.loc[both], queue.loc[both]
    close = {name: int((ours[name] <= most * queue[name]).sum()) for name, most in LIMITS.items()}
    counts = [f"{name} at most {LIMITS[name]:g} times in {count}" for name, count in close.items()]
    told = f"In {len(ratios) - len(lost)} of {len(ratios)} situations with a rival the gateway's "
    told += "p99.9 is the lowest or within 10 % of it."
    told += f" It is higher with: {'; '.join(lost)}." if lost else ""
    told += f" Compared with HAProxy, of {len(both)}: {', '.join(counts)}."
    copied = ours[(ours.index.get_level_values("fault") != "garbage") & (ours.work > 0)].work - 1
    if len(copied):
        mean, most = 100 * copied.mean(), 100 * copied.max()
        told += f" Copies add {mean:.1f} % of requests on average, {most:.1f} % at most."
    over = ours.index.get_level_values("load") > 1
    if over.any():
        least = (ours.goodput / queue.goodput)[over].min()
        told += f" Above capacity its goodput is at least {least:.2f} times HAProxy's."
    return told


def several_of(rows: pd.DataFrame) -> str:
    """Return the tables of one, two and four instances of each, and how members compare with one.

    The first has p99.9 where servers are idle half of the time, the second p50 / p90 / p99 where
    they are busy. Figures are medians of the seeds, bold if level with the best of their line.
    """
    rows = reported(rows)
    place = ["fault", "load", "instances"]
    figures = [*LIMITS, "work", "processor_ms", "errors"]
    medians = rows.groupby([*place, "peer"], sort=False)[figures].median()
    texts = []
    for is_busy, levels in ((False, ["p99.9"]), (True, ["p50", "p90", "p99"])):
        found = medians[(medians.index.get_level_values("load") > 0.5) == is_busy]
        best = found.groupby(place, sort=False)[levels[-1]].transform("min")
        cells = pd.Series(
            [
                " / ".join(f"{line[level]:.0f}" for level in levels)
                + (f", {line.errors:.0f} failed" if line.errors else "")
                for _, line in found.iterrows()
            ],
            found.index,
        )
        is_level = found[levels[-1]] <= CLOSE * best
        cells = cells.where(~is_level, "**" + cells + "**").unstack("peer", sort=False)
        if len(cells):
            told = [f"{fault}, {100 * load:.0f} %, {n}" for fault, load, n in cells.index]
            cells = cells[[name for name in SEVERAL if name in cells]].rename(columns=SEVERAL)
            cells.insert(0, f"fault, load, instances: {' / '.join(levels)}, ms", told)
            texts.append(markdown(cells).strip())
    return "\n\n".join([*texts, _beside_one(medians), stale(rows, MEASURE_SEVERAL)]).strip()


def _beside_one(medians: pd.DataFrame) -> str:
    """Return how four members compare with a single gateway."""
    try:
        four = medians.xs((4, "ours-members"), level=("instances", "peer"))
        one = medians.xs((1, "ours-hedge"), level=("instances", "peer"))
    except KeyError:
        return ""
    both = four.index.intersection(one.index)
    four, one = four.loc[both], one.loc[both]
    busy = both.get_level_values("load") > 0.5
    idle_level = (four["p99.9"] <= 1.3 * one["p99.9"] + 3)[~busy]
    levels = ["p50", "p90", "p99"]
    ratios = (four / one)[levels][busy]
    work = (four.work / one.work - 1).abs().max()
    processor = (four.processor_ms - one.processor_ms).median()
    return (
        f"Four members beside one gateway: at 40 % load p99.9 is at most 1.3 times as high plus "
        f"3 ms under {idle_level.sum()} of {len(idle_level)} faults; at 70 and 90 % p50, p90 and "
        f"p99 are at most 1.2 times as high in {int((ratios <= 1.2).to_numpy().sum())} of "
        f"{ratios.size} figures. Their servers' work differs by {100 * work:.1f} % at most, and a "
        f"request takes {processor:+.2f} ms of a core (median)."
    )


def _usual(path: Path) -> pd.DataFrame:
    """Return the rows of README's situation: eight servers, one slot, 40 % busy, Poisson."""
    rows = reported(read(path))
    usual = (rows.load == 0.4) & (rows.servers == 8) & (rows.slots == 1) & ~rows.bursty
    usual &= rows.instances == 1
    return rows[usual & rows.fault.isin(FIRST) & (rows.kind == "timed")]


def readme(path: Path) -> str:
    """Return README's table: a line for each contender, a column for each fault."""
    rows = _usual(path)
    cells = _cells(rows, ["fault"]).T
    cells = cells[[fault for fault in FIRST if fault in cells]].rename(columns=FAULTS)
    found = markdown(cells.rename(index=TITLES).reset_index(names="p99.9, ms")).strip()
    return f"{found}\n\n{stale(rows)}".strip()


def configurations() -> str:
    """Return the configurations of all rivals, with the reasons of their lines."""
    texts = [
        f"`{peer}`:\n\n```{language}\n{CONTENDERS[peer].configuration(EXAMPLE).strip()}\n```"
        for peer, language in SHOWN.items()
    ]
    options = [
        {"option": f"`{name} {value}`", "why": why} for name, (value, why) in VLLM_ROUTER.items()
    ]
    texts.append(f"`vllm-router`:\n\n{markdown(pd.DataFrame(options)).strip()}")
    return "\n\n".join(texts)


def draw(path: Path, picture: Path) -> None:
    """Draw p99.9 of every contender when requests block their servers."""
    from matplotlib.figure import Figure

    rows = _usual(path)
    found = rows[rows.fault == "pareto"].groupby("peer")["p99.9"].agg(["median", "min", "max"])
    found = found.sort_values("median", ascending=False)
    medians = found["median"]
    figure = Figure(figsize=(7, 0.45 * len(medians) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [TITLES[name].replace("`", "").replace("**", "") for name in medians.index]
    colours = ["#1a56c4" if name.startswith("ours") else "#9aa0a6" for name in medians.index]
    ranges = [(medians - found["min"]).to_numpy(), (found["max"] - medians).to_numpy()]
    bars = axes.barh(names, medians.to_numpy(), xerr=ranges, color=colours, ecolor="#3c4043")
    axes.bar_label(bars, [f"{value:.0f} ms" for value in medians], padding=4)
    axes.set_xlim(0, 1.15 * float(found["max"].max()))
    axes.set_xlabel("p99.9 in milliseconds: median and range of the seeds")
    figure.suptitle("1 % of requests block their server; 40 % busy before that", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
