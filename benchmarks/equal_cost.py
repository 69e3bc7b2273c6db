"""The tables of equal cost: what methods recover when the extra worker may spend the same.

They are made of `accuracy.jsonl` and `equal-cost.jsonl`, and of what the bundles' trainings from
another seed reached (`seed-NAME.json`). The unit of cost is a query of the served model, in
multiply-adds. All of it is on the bundles' own f and g, with one worker missing. Decoding is not
counted: it is the front end's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from benchmarks.bundles import another_seed
from codedinvnet.codes.registry import OURS
from codedinvnet.data.load import KNOWN
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.grid import latest, read_rows
from codedinvnet.evaluation.quantiles import clustered_ci

SIZES = (2, 4, 10)
FILES = ("accuracy.jsonl", "equal-cost.jsonl")
SPENDS = "spends, " + " / ".join(f"k = {k}" if k == SIZES[0] else str(k) for k in SIZES)
BACKUPS = ("small-backup", "small-backup@1.4")
"""At the cost of one query, and at about what f and E of a code cost for a group of ten."""
OWN = (BACKUPS[1], "collage", "collage@1.4", "superposition", "superposition@1.4")
"""Methods that only these tables show, whichever file has their rows."""
ON_ONE_F = ", on one f"
"""Said of a verdict if the backups' trainings share one f: their interval is too narrow then."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "1": (
        *(BACKUPS[0], "collage", "superposition", "parm", "average-image"),
        *("approxifer", "nercc"),
    ),
    "1.4": (BACKUPS[1], "collage@1.4", "superposition@1.4"),
    "its own": (OURS, "coded-invnet-paper"),
}
"""The methods by what they may spend: a code's f and E cost what they cost."""
LEFT_OUT = ("none", "replication", "oracle", "approxifer-byzantine")
"""Bounds, and what needs more than one extra worker."""


class Results:
    """What a folder of results says, in %.

    Args:
        folder: where the rows lie.
    """

    def __init__(self, folder: Path) -> None:
        rows = [row for name in FILES for row in read_rows(folder / name, "accuracy")]
        rows.sort(key=lambda row: str(row.get("began", "")))  # the latest row decides
        self.datasets: list[str] = []
        self.methods: list[str] = []
        if not rows:
            return
        trials = latest(rows, tables.TRIAL, repeated=["seed"])
        trials = trials[~trials["settings"].map(lambda own: own["quick"]).astype(bool)]
        one = (trials["missing"] == 1) & (trials["corrupt"] == 0)
        self.trials = trials[one]
        plain = trials[trials["label"] == "none"].drop_duplicates(["dataset", "base"], keep="last")
        self.normal = 100 * plain.set_index(["dataset", "base"])["normal"]
        on_f = self.trials[self.trials["base"] == "invertible"]
        self.datasets = sorted(on_f["dataset"].unique(), key=_order)
        self.methods = list(on_f["label"].unique())
        self.others = {name: another_seed(folder, name) for name in self.datasets}

    def of(self, dataset: str, method: str, k: int, base: str = "invertible") -> DataFrame:
        """Return a method's trainings."""
        t = self.trials
        place = (t["dataset"] == dataset) & (t["label"] == method) & (t["k"] == k)
        return t[place & (t["base"] == base)]

    def recovered(self, dataset: str, method: str, k: int, base: str = "invertible") -> list[float]:
        """Return the recovered accuracy of each training, of the code also that of another seed."""
        own = self.of(dataset, method, k, base)
        found = [100 * float(value) for value in own["recovered"]]
        again = self.others[dataset].get(f"test_k{k}")
        if found and method == OURS and again and _measured_alike(own.iloc[-1], again):
            found.append(100 * again["recovered_accuracy"])
        return found

    def spent(self, dataset: str, method: str, k: int) -> float:
        """Return what the extra worker computes for a full group, in queries of g(f(x))."""
        return tables.spent(self.of(dataset, method, k).tail(1))


def _measured_alike(row: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """Tell whether an evaluation of a bundle is of the groups that a row of it is of."""
    settings = row["settings"]
    same = {
        "dataset": row["dataset"],
        "split": "test",
        "evidence": "both",
        "parity": "encoder",
        "k": row["k"],
        "images": settings.get("test_images"),
        "groupings": settings.get("groupings"),
        "seed": settings.get("grouping_seed"),
    }
    return all(report.get(name) == value for name, value in same.items())


def _order(dataset: str) -> tuple[int, str]:
    known = list(KNOWN)
    return (known.index(dataset) if dataset in known else len(known), dataset)


def half_width(ours: Sequence[float], theirs: Sequence[float] = ()) -> float:
    """Return half of the 95 % interval of a mean over trainings, or of a difference of two means.

    NaN if a sample is of one training.
    """
    clusters = [1.0] * len(ours) + [-1.0] * len(theirs)
    half = clustered_ci([*ours, *theirs], clusters, weights={1.0: 1.0, -1.0: -1.0}, fewest=2)
    return math.nan if half is None else half


def table(folder: Path) -> str:
    """Return what methods spend and recover at each group size, and over how many trainings."""
    results = Results(folder)
    known = {*LEFT_OUT, *(name for names in GROUPS.values() for name in names)}
    others = tuple(name for name in results.methods if name not in known)
    lines = []
    for dataset in results.datasets:
        for cost, methods in {**GROUPS, "–": others}.items():
            for method in methods:
                own = [results.recovered(dataset, method, k) for k in SIZES]
                if any(own):
                    spent = [results.spent(dataset, method, k) for k in SIZES]
                    lines.append(
                        {
                            **{"data set": dataset, "may spend": cost, "method": method},
                            SPENDS: " / ".join("–" if pd.isna(s) else f"{s:.2f}" for s in spent),
                            **{f"k = {k}": _cell(v) for k, v in zip(SIZES, own, strict=True)},
                        }
                    )
    return tables.markdown(DataFrame(lines))


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    half = half_width(values)
    return (
        f"{_mean(values):.2f}"
        + ("" if math.isnan(half) else f" ± {half:.2f}")
        + (f" ({len(values)})")
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def margins(folder: Path) -> str:
    """Return how far the code is ahead of the backups, and where it pays for its f.

    A plain ResNet of f's cost answers directly more often right than f and g: that is the price of
    f. Whoever keeps the ResNet has a backup of it. So the code must be ahead of the dearest backup,
    of the ResNet where that was measured, else of f and g.
    """
    results = Results(folder)
    lines = []
    for dataset in results.datasets:
        direct = [
            results.normal.get((dataset, base), math.nan) for base in ("resnet", "invertible")
        ]
        price = direct[0] - direct[1]
        for k in SIZES:
            code = results.recovered(dataset, OURS, k)
            rivals = {name: results.recovered(dataset, name, k) for name in BACKUPS}
            known = [values for values in rivals.values() if values]
            if not code or not known:
                continue
            dearest = [name for name, values in rivals.items() if values][-1]
            cells = {}
            for name, values in rivals.items():
                pair = [results.spent(dataset, method, k) for method in (OURS, name)]
                spends = "" if any(map(math.isnan, pair)) else "; {:.2f} against {:.2f}"
                margin = _margin(code, values) + spends.format(*pair) if values else "not measured"
                cells[f"code − {name}"] = margin
            resnets = results.recovered(dataset, dearest, k, "resnet")
            lines.append(
                {
                    **{"data set": dataset, "k": str(k), **cells},
                    "price of f": "not measured" if math.isnan(price) else f"{price:.2f}",
                    "pays from": _pays(price, code, known, resnets),
                }
            )
    return tables.markdown(DataFrame(lines))


def _margin(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return how far the code is ahead of a backup, whose trainings all have the bundle's f."""
    margin, half = _mean(ours) - _mean(theirs), half_width(ours, theirs)
    if math.isnan(half):
        once = [name for name, values in (("code", ours), ("backup", theirs)) if len(values) < 2]
        return f"{margin:+.2f} ({once[0] if len(once) == 1 else 'each'} trained once)"
    verdict = "ahead" if margin > half else "behind" if margin < -half else "open"
    return f"{margin:+.2f} ± {half:.2f} ({verdict}{'' if verdict == 'open' else ON_ONE_F})"


def _pays(
    price: float,
    ours: Sequence[float],
    rivals: Sequence[Sequence[float]],
    resnets: Sequence[float],
) -> str:
    """Return which share of late answers makes up for the price of f, if the code is ahead.

    Args:
        price: how much more often the plain ResNet's direct answers are right, in points.
        ours: what the code recovered, of each training.
        rivals: the same of backups of one f, the dearest last.
        resnets: the same of the dearest backup of plain ResNets, each training with its own.
    """

    def behind(theirs: Sequence[float]) -> bool:
        return _mean(ours) - _mean(theirs) < -half_width(ours, theirs)

    if resnets and behind(resnets):
        return "nowhere"
    if any(map(behind, rivals)):
        return f"nowhere{ON_ONE_F}"
    theirs, shared = (resnets, "") if resnets else (rivals[-1], ON_ONE_F)
    margin = _mean(ours) - _mean(theirs)
    if not margin > half_width(ours, theirs):
        return "open"
    if math.isnan(price):
        return "not measured"
    share = f"{100 * price / (price + margin):.0f} % late answers" if price > 0 else "everywhere"
    return share + shared
