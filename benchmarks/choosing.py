"""How well `auto` chooses: its p99.9 compared with that of the fixed policies, from a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, Series, isna

from codedinvnet.codes.rules import SMALL_BACKUP
from codedinvnet.evaluation import tables
from codedinvnet.scheduler.policies import AUTO, CODED, HEDGE, UNCODED, WITH_HEDGE
from codedinvnet.simulation import sweep

NOTHING = f"{AUTO.name}+none"
"""`auto` with no code at hand."""
RIVALS: Mapping[str, tuple[str, ...]] = {
    CODED.name: (HEDGE.name, SMALL_BACKUP),
    (CODED | HEDGE).name: (HEDGE.name, SMALL_BACKUP, SMALL_BACKUP + WITH_HEDGE),
}
"""A policy that codes, and what it competes with: one that hedges, too, with another that does."""
NEAR = 1.1
"""A p99.9 of so many times the lowest is as good."""
STRAGGLING = ("held", "exponential", "pareto", "bursts")
"""Straggler models whose delays come and go, and are no worker's own."""
QUIET = "none"
"""The straggler model in which nobody straggles."""
AT_THE_EDGE = "hung"
"""A straggler model whose places are left out. Of the requests of ten to eleven workers 0.09 % have
a task that never ends: whether p99.9 is one of these is a coin toss. Of single images 0.009 % have
one, and a run has two of them."""


def fixed(policies: Series) -> Series:
    """Tell which of the policies do not choose."""
    return ~policies.str.startswith(AUTO.name)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of places of which p99.9 tells how policies differ."""
    rows = sweep.read_rows(path)
    return [row for row in rows if row["stragglers"] != AT_THE_EDGE]


def choosing(path: Path) -> str:
    """Return how far policies are from the lowest p99.9 of the fixed ones, over all places.

    Lines below the table name the places whose runs were too short. Those AT_THE_EDGE are left out.
    """
    rows = _rows(path)
    frame = sweep.frame_of(rows)
    late = sweep.by_policy(frame).astype(float)
    lowest = late.loc[:, fixed(late.columns.to_series())].min(axis="columns")
    works = frame.groupby("policy")["work"]
    lines = []
    for name in late:
        near = _over(late[name], lowest)
        lines.append(
            {
                "policy": name,
                f"within {NEAR - 1:.0%} of the lowest": f"{(near <= NEAR).sum()} of {len(near)}",
                "farthest": _farthest(near),
                f"over {NEAR:g} x uncoded": int((_over(late[name], late["uncoded"]) > NEAR).sum()),
                "work": f"{works.min()[name]:.2f} to {works.max()[name]:.2f}",
            }
        )
    text = [tables.markdown(DataFrame(lines)).strip()]
    if NOTHING in late:
        two = _over(late[NOTHING], late[["uncoded", "hedge"]].min(axis="columns"))
        text.append(
            f"`{NOTHING}`, within {NEAR - 1:.0%} of the lower of `uncoded` and `hedge`: "
            f"{(two <= NEAR).sum()} of {len(two)}; farthest: {_farthest(two)}."
        )
    for name, rivals in RIVALS.items():
        if {name, *rivals} <= {*late}:
            ratios = _over(late[name], late[[*rivals]].min(axis="columns"))
            those = ", ".join(f"`{rival}`" for rival in rivals)
            text.append(
                f"`{name}` is lower than each of {those} in {(ratios < 1).sum()} of "
                f"{len(ratios)}; {ratios.min():.3f} times their lowest at best."
            )
    doubts = "\n".join(f"- {line}" for line in sweep.warnings_of(rows))
    return "\n\n".join([*text, *_quiet(rows), *([doubts] if doubts else [])])


def beside_hedge(path: Path) -> str:
    """Return the p99.9 of `auto` over that of `hedge`, by load, and its means where tasks straggle.

    A mean is the geometric one over STRAGGLING, with the least and the most of these models, which
    were chosen and are no sample of others.
    """
    late = sweep.by_policy(sweep.frame_of(_rows(path))).astype(float)
    if not {AUTO.name, HEDGE.name} <= {*late}:
        return ""
    ratios = _over(late[AUTO.name], late[HEDGE.name]).unstack("load")
    lines = [
        {"stragglers": model, "images of a request": batch, **_by_load(row)}
        for (model, batch), row in ratios.sort_index(level="batch", sort_remaining=False).iterrows()
    ]
    some = ratios[ratios.index.get_level_values("stragglers").isin(STRAGGLING)]
    for batch, own in some.groupby(level="batch"):
        named = f"mean of {', '.join(own.index.get_level_values('stragglers'))}"
        lines.append({"stragglers": named, "images of a request": batch, **_means(own)})
    return tables.markdown(DataFrame(lines))


def _means(ratios: DataFrame) -> dict[str, str]:
    """Return the geometric mean of each load's ratios, the least and the most."""
    told = {}
    for load, own in ratios.items():
        mean = float(np.exp(np.log(own).mean()))
        extent = f"{mean:.2f} ({own.min():.2f} to {own.max():.2f})"
        told[f"{load:.0%}"] = "" if isna(mean) else extent
    return told


def _by_load(ratios: Series) -> dict[str, str]:
    return {f"{load:.0%}": "" if isna(r) else f"{r:.2f}" for load, r in ratios.items()}


def _quiet(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what `auto` costs where nobody straggles."""
    rows = {}
    for row in found:
        cell = sweep.Point.of(row)
        if cell.stragglers == QUIET and cell.policy in (AUTO.name, UNCODED.name):
            rows[cell] = Series({k: row[k] for k in ("p50_ms", "p99_ms", "work_per_query")})
    ratios = [
        row / rows[cell._replace(policy=UNCODED.name)]
        for cell, row in rows.items()
        if cell.policy == AUTO.name
    ]
    if not ratios:
        return []
    most = DataFrame(ratios).max()
    return [
        f"`{AUTO.name}` where nobody straggles, over `uncoded`, in {len(ratios)} places at "
        f"most: p50 {most['p50_ms']:.3f}, p99 {most['p99_ms']:.3f}, work "
        f"{most['work_per_query']:.3f}."
    ]


def _over(late: Series, to: Series) -> Series:
    """Return a policy's p99.9 over another, by place; 1 where both are infinite."""
    return (late / to).where(late != to, 1.0).dropna()


def _farthest(ratios: Series) -> str:
    model, batch, load = ratios.idxmax()
    return f"{ratios.max():.2f} ({model}, {batch}, {load:.0%})"
