"""Simulated policies: tables of tails and costs, and of how well `auto` chooses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame, Series, isna

from benchmarks import sweep
from benchmarks.bundles import BUNDLES, HARD
from codedinvnet.codes.named_policies import served_as
from codedinvnet.codes.registry import find_method
from codedinvnet.codes.rules import SMALL_BACKUP
from codedinvnet.common.grid import read_rows
from codedinvnet.evaluation import tables
from codedinvnet.scheduler.policies import AUTO, CODED, HEDGE, UNCODED, WITH_HEDGE

CHOICE = ("auto", "hedge", "small-backup", "small-backup+hedge", "coded")
"""The policies of the table to choose by."""
APPROXIMATE = "approximate answers, %"
RIVALS: Mapping[str, tuple[str, ...]] = {
    CODED.name: (HEDGE.name, SMALL_BACKUP),
    (CODED | HEDGE).name: (HEDGE.name, SMALL_BACKUP, SMALL_BACKUP + WITH_HEDGE),
}
"""A policy that codes, and its rivals: those that hedge only if it hedges as well."""
NEAR = 1.1
"""A p99.9 of at most so many times the lowest is as good."""
STRAGGLING = ("held", "exponential", "pareto", "bursts")
"""Straggler models whose delays come and go."""
AT_THE_EDGE = "hung"
"""A straggler model whose places are left out of the comparisons. Of the requests of ten to eleven
workers 0.09 % have a task that never ends, so whether p99.9 is one of these is a coin toss."""


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return simulated p99.9 in ms: a line for each place, a column for each policy.

    An interval follows p99.9 where the run was long enough for one. The last lines have what the
    policies cost, from the least of all places to the most.
    """
    frame = sweep.frame_of(rows)
    late, low, high = (sweep.by_policy(frame, name) for name in ("p999", "low", "high"))
    form = "{:.0f}".format
    interval = " (" + low.map(form) + "–" + high.map(form) + ")"
    texts = late.map(form) + interval.where(low.notna(), "")
    several = frame["load"].nunique() > 1
    lines = [
        {
            "p99.9, ms": f"{Path(model).stem}; {batch} image{'s' if batch > 1 else ''}"
            + (f"; {load:.0%}" if several else ""),
            **line,
        }
        for (model, batch, load), line in zip(late.index, texts.to_dict("records"), strict=True)
    ]
    work = frame.groupby("policy")["work"].agg(["min", "max"])
    spent = {policy: f"{least:.2f} to {most:.2f}" for policy, (least, most) in work.T.items()}
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
    answers are of the image sets whose bundles ship: approximate ones of f, on which every method
    was measured, and a hedge's of the plain ResNet, because it needs no f.
    """
    frame = sweep.frame_of(sweep.read_rows(folder / "policies.jsonl"))
    accuracy = tables.accuracy_frame(read_rows(folder / "accuracy.jsonl", "accuracy"))
    one = (accuracy["k"] == k) & (accuracy["missing"] == 1)
    here = tables.on_f(accuracy[one]).set_index(["method", "dataset"])
    plain = accuracy[one & (accuracy["base"] == "resnet")].groupby("dataset")["normal"].first()
    names = [name for name in BUNDLES if name in set(accuracy["dataset"])]
    late = sweep.by_policy(frame)
    ratios = late.div(late[UNCODED.name], axis="index")
    work = 100 * (frame.groupby("policy")["work"].agg(["min", "max"]) - 1)
    shares = approximate(frame)
    lines = []
    for policy in CHOICE:
        served, own = served_as(policy), ratios[policy]
        method = find_method(served.method)
        exact = not served.by_name and not served.rules.coded
        late_right, direct_right = (
            [plain.get(n) if exact else here[column].get((served.method, n)) for n in names]
            for column in ("recovered", "normal")
        )
        trained = "f, g and E" if method.of_bundle else "a small network"
        lines.append(
            {
                "policy": f"`{policy}`",
                "p99.9, without = 1": _extent(own),
                "extra work, %": "{:.1f} to {:.1f}".format(*work.loc[policy]),
                APPROXIMATE: shares[policy],
                f"late answers right, %: {', '.join(names)}": percents(late_right),
                "direct answers right, %": percents(direct_right),
                "to be trained": "nothing" if exact else trained,
            }
        )
    return tables.markdown(DataFrame(lines))


def _extent(ratios: Series) -> str:
    """Return the geometric mean of ratios, and their range."""
    mean = float(np.exp(np.log(ratios).mean()))
    return "" if isna(mean) else f"{mean:.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


# How well `auto` chooses


def _late(path: Path) -> DataFrame:
    """Return p99.9 by place and policy, where it tells how policies differ."""
    frame = sweep.frame_of(sweep.read_rows(path))
    return sweep.by_policy(frame[frame["stragglers"] != AT_THE_EDGE]).astype(float)


def choosing(path: Path) -> str:
    """Return how far policies are from the lowest p99.9 of the fixed ones, over all places.

    Lines below the table compare the codes with their rivals, and name places whose runs were too
    short.
    """
    rows = [row for row in sweep.read_rows(path) if row["stragglers"] != AT_THE_EDGE]
    works = sweep.frame_of(rows).groupby("policy")["work"].agg(["min", "max"])
    late = _late(path)
    lowest = late.loc[:, ~late.columns.str.startswith(AUTO.name)].min(axis="columns")
    lines = []
    for name in late:
        near, without = _over(late[name], lowest), _over(late[name], late[UNCODED.name])
        model, batch, load = near.idxmax()
        lines.append(
            {
                "policy": name,
                f"within {NEAR - 1:.0%} of the lowest": f"{(near <= NEAR).sum()} of {len(near)}",
                "farthest": f"{near.max():.2f} ({model}, {batch}, {load:.0%})",
                f"over {NEAR:g} x uncoded": int((without > NEAR).sum()),
                "work": "{:.2f} to {:.2f}".format(*works.loc[name]),
            }
        )
    text = [tables.markdown(DataFrame(lines)).strip()]
    for name, rivals in RIVALS.items():
        ratios = _over(late[name], late[[*rivals]].min(axis="columns"))
        text.append(
            f"`{name}` is lower than each of {', '.join(f'`{rival}`' for rival in rivals)} in "
            f"{(ratios < 1).sum()} of {len(ratios)}; {ratios.min():.3f} times their lowest at best."
        )
    return "\n\n".join([*text, "\n".join(f"- {line}" for line in sweep.warnings_of(rows))])


def over_hedge(path: Path) -> str:
    """Return the p99.9 of `auto` over that of `hedge`, by load, and its means where tasks straggle.

    A mean is the geometric one over STRAGGLING, models that were chosen and are no sample.
    """
    late = _late(path)
    ratios = _over(late[AUTO.name], late[HEDGE.name]).unstack("load")
    lines = [
        {
            "stragglers": model,
            "images of a request": batch,
            **{f"{load:.0%}": "" if isna(ratio) else f"{ratio:.2f}" for load, ratio in row.items()},
        }
        for (model, batch), row in ratios.sort_index(level="batch", sort_remaining=False).iterrows()
    ]
    some = ratios[ratios.index.get_level_values("stragglers").isin(STRAGGLING)]
    for batch, own in some.groupby(level="batch"):
        named = f"mean of {', '.join(own.index.get_level_values('stragglers'))}"
        means = {f"{load:.0%}": _extent(values) for load, values in own.items()}
        lines.append({"stragglers": named, "images of a request": batch, **means})
    return tables.markdown(DataFrame(lines))


def _over(late: Series, to: Series) -> Series:
    """Return a policy's p99.9 over another, by place; 1 where both are infinite."""
    return (late / to).where(late != to, 1.0).dropna()


def members(path: Path) -> str:
    """Return p50 / p99 / p99.9 in ms of several gateways: alone, and as members.

    A line for each number of gateways, fault and load; a column for each time of a message. The
    last one has the time from which on p99 is lower if all decide alone.
    """
    lines: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in read_rows(path, sweep.KIND):
        fault, variant = row["stragglers"].split(", ", 1)
        size, way = variant.split(": ")
        lines.setdefault((size, fault, f"{row['load']:.0%}"), {})[way] = row
    table = []
    for (size, fault, load), found in lines.items():
        late = {way: row["p99_ms"] for way, row in found.items()}
        times = [way for way in late if way.endswith("ms")]
        better = [n for n, way in enumerate(times) if late[way] <= late["alone"]]
        worse = times[max(better, default=-1) + 1 :]
        told = {
            way: " / ".join(f"{row[level]:.0f}" for level in ("p50_ms", "p99_ms", "p999_ms"))
            for way, row in found.items()
        }
        place = {
            "gateways, servers": size.replace(" before ", ", "),
            "fault, load": f"{fault}, {load}",
        }
        table.append(
            {**place, **told, "alone is better from": worse[0] if worse else "none of these"}
        )
    return tables.markdown(DataFrame(table))
