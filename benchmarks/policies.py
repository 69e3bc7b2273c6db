"""Simulated policies: a table to choose by, and pictures of a tail and of what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from benchmarks.bundles import BUNDLES, HARD
from codedinvnet.codes.named_policies import SERVED, served_as
from codedinvnet.codes.registry import find_method
from codedinvnet.common.files import write_picture
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.grid import read_rows
from codedinvnet.evaluation.plots import STYLE
from codedinvnet.scheduler.policies import UNCODED
from codedinvnet.simulation import sweep

PALETTE = (
    *("#777777", "#0072b2", "#e69f00", "#cc3311", "#009e73"),
    *("#cc79a7", "#56b4e9", "#999933", "#000000"),
)
"""Colours that colour-blind readers can distinguish (Okabe and Ito), in the order of SERVED."""
OTHER = "#332288"
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
    answers are of the image sets whose bundles ship: approximate ones of f, on which every method
    was measured, and a hedge's of the plain ResNet, because it needs no f.
    """
    if not (folder / "policies.jsonl").is_file() or not (folder / "accuracy.jsonl").is_file():
        return ""
    frame = sweep.frame_of(sweep.read_rows(folder / "policies.jsonl"))
    accuracy = tables.accuracy_frame(read_rows(folder / "accuracy.jsonl", "accuracy"))
    one = (accuracy["k"] == k) & (accuracy["missing"] == 1) & (accuracy["corrupt"] == 0)
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
        mean = math.prod(own) ** (1 / len(own))
        lines.append(
            {
                "policy": f"`{policy}`",
                "p99.9, without = 1": f"{mean:.2f} ({own.min():.2f} to {own.max():.2f})",
                "extra work, %": "{:.1f} to {:.1f}".format(*work.loc[policy]),
                APPROXIMATE: shares[policy],
                f"late answers right, %: {', '.join(names)}": percents(late_right),
                "direct answers right, %": percents(direct_right),
                "to be trained": "nothing" if exact else trained,
            }
        )
    return tables.markdown(DataFrame(lines))


def colour(policy: str) -> str:
    """Return a policy's colour, the same in every picture; OTHER if PALETTE has none for it."""
    return dict(zip(SERVED, PALETTE, strict=False)).get(policy, OTHER)


def draw(path: Path) -> None:
    """Draw the rows of a study as a picture in the same folder."""
    with plt.style.context(STYLE):
        figure = work(sweep.frame_of(sweep.read_rows(path)))
    write_picture(path.with_name(f"{path.stem}-work.png"), figure)
    plt.close(figure)


def work(frame: DataFrame) -> Figure:
    """Draw p99.9 relative to the best policy of each place, and extra work, a bar a policy."""
    table = sweep.by_policy(frame)
    ratios = table.div(table.min(axis="columns"), axis="index")
    means = {policy: math.prod(ratios[policy]) ** (1 / len(ratios)) for policy in ratios}
    order = sorted(means, key=means.__getitem__, reverse=True)
    spent = frame.groupby("policy")["work"].mean()
    figure, (left, right) = plt.subplots(
        ncols=2, figsize=(7.5, 2.8), sharey=True, layout="constrained"
    )
    bars(left, {policy: means[policy] for policy in order}, "{:.2f}×")
    left.set_xlabel(
        f"p99.9 relative to the best policy\n(geometric mean of {len(ratios)} settings)"
    )
    bars(right, {policy: abs(round(100 * (spent[policy] - 1), 1)) for policy in order}, "{:.1f} %")
    right.set_xlabel("extra work in %\n(mean of the same settings)")
    return figure


def bars(axis: Axes, values: Mapping[str, float], form: str) -> None:
    """Draw a labelled bar for each policy, the last on top."""
    drawn = axis.barh([*values], [*values.values()], color=[*map(colour, values)], height=0.7)
    axis.bar_label(drawn, [form.format(value) for value in values.values()], padding=3, fontsize=8)
    axis.set_xlim(0, 1.2 * max(values.values()))
    axis.grid(axis="y", visible=False)
