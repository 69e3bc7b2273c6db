"""The tables of equal cost: what methods recover when the extra worker may spend the same.

They are made of `accuracy.jsonl` and `equal-cost.jsonl`, and of what the bundles' trainings from
another seed reached (`seed-NAME.json`). The unit of cost is a query of the served model, in
multiply-adds. One worker is missing. Decoding is not counted, because the front end does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pandas import DataFrame, Series, concat, isna

from codedinvnet.codes.registry import METHODS, OURS
from codedinvnet.common.files import read_json
from codedinvnet.common.grid import latest, read_rows
from codedinvnet.common.quantiles import clustered_ci
from codedinvnet.data.load import KNOWN
from codedinvnet.evaluation import tables

SIZES = (2, 4, 10)
FILES = ("accuracy.jsonl", "equal-cost.jsonl")
BACKUPS = ("small-backup", "small-backup@1.4")
"""At the cost of one query, and at about what f and E of a code cost for a group of ten."""
OWN = (BACKUPS[1],)
"""Methods that only these tables show, whichever file has their rows."""
LEFT_OUT = ("none", "replication", "oracle")
"""Bounds, and what needs more than one extra worker."""
COLUMNS = ["dataset", "base", "label", "k", "recovered", "normal", "spends"]


def trainings(folder: Path) -> DataFrame:
    """Return a line for each training and group size; shares in %."""
    rows = [row for name in FILES for row in read_rows(folder / name, "accuracy")]
    rows.sort(key=lambda row: str(row.get("began", "")))  # the latest row decides
    if not rows:
        return DataFrame(columns=COLUMNS)
    found = latest(rows, tables.TRIAL, repeated=["seed"])
    quick = found["settings"].map(lambda own: own["quick"]).astype(bool)
    found = found[~quick & (found["missing"] == 1) & (found["corrupt"] == 0)]
    found = found.reindex(columns=[*COLUMNS, "extra_macs", "served_macs"])
    found[["recovered", "normal"]] *= 100
    found["spends"] = found["extra_macs"] / found["served_macs"]
    again = [
        {"dataset": name, "base": "invertible", "label": OURS, "k": k}
        | {"recovered": 100 * report["recovered_accuracy"]}
        for name in found["dataset"].unique()
        if (path := folder / f"seed-{name}.json").is_file()
        for k in SIZES
        if (report := read_json(path).get(f"test_k{k}"))
    ]
    own = found[COLUMNS].astype({"recovered": float, "normal": float})
    if again:
        own = concat([own, DataFrame(again, columns=COLUMNS).astype(own.dtypes)])
    return tables.in_order(own, dataset=KNOWN, label=METHODS, k=())


def _cell(values: Series) -> str:
    """Return the mean of trainings with its 95 % interval, and their number."""
    if values.empty:
        return "not measured"
    half = clustered_ci(list(values), fewest=2)
    return f"{values.mean():.2f}{'' if half is None else f' ± {half:.2f}'} ({len(values)})"


def table(folder: Path) -> str:
    """Return what methods spend and recover at each group size, and over how many trainings."""
    frame = trainings(folder)
    frame = frame[(frame["base"] == "invertible") & ~frame["label"].isin(LEFT_OUT)]
    lines = []
    for (dataset, method), own in frame.groupby(["dataset", "label"], sort=False):
        sizes = {k: own[own["k"] == k] for k in SIZES}
        known = [one["spends"].dropna().tail(1) for one in sizes.values()]
        spends = " / ".join(f"{one.iloc[0]:.2f}" if len(one) else "–" for one in known)
        cells = {f"k = {k}": _cell(one["recovered"]) for k, one in sizes.items()}
        lines.append({"data set": dataset, "method": method, "spends": spends, **cells})
    return tables.markdown(DataFrame(lines))


def _margin(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return how far the code is ahead of a backup, with the interval if both have several."""
    if not len(theirs):
        return "not measured"
    clusters = [1.0] * len(ours) + [-1.0] * len(theirs)
    weights = {1.0: 1.0, -1.0: -1.0}
    half = clustered_ci([*ours, *theirs], clusters, weights=weights, fewest=2)
    margin = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return f"{margin:+.2f}{'' if half is None else f' ± {half:.2f}'}"


def margins(folder: Path) -> str:
    """Return how far the code is ahead of the backups, and what its f costs.

    The price of f is how much more often a plain ResNet of f's cost answers directly right.
    """
    frame = trainings(folder)
    plain = frame[frame["label"] == "none"].groupby(["dataset", "base"])["normal"].last()
    frame = frame[frame["base"] == "invertible"]
    lines = []
    for (dataset, k), here in frame.groupby(["dataset", "k"], sort=False):
        own = {name: list(here[here["label"] == name]["recovered"]) for name in (OURS, *BACKUPS)}
        if own[OURS] and any(own[name] for name in BACKUPS):
            direct = [plain.get((dataset, base), float("nan")) for base in ("resnet", "invertible")]
            price = direct[0] - direct[1]
            cells = {f"code − {name}": _margin(own[OURS], own[name]) for name in BACKUPS}
            price = "not measured" if isna(price) else f"{price:.2f}"
            lines.append({"data set": dataset, "k": str(k), **cells, "price of f": price})
    return tables.markdown(DataFrame(lines))
