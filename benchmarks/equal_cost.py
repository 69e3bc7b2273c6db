"""The tables of equal cost: what methods recover when the extra worker may spend the same.

They are made of `accuracy.jsonl` and `equal-cost.jsonl`, and of what the bundles' trainings from
another seed reached (`seed-NAME.json`). The unit of cost is a query of the served model, in
multiply-adds. One worker is missing. Decoding is not counted, because the front end does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pandas import DataFrame, Series, concat, isna

from codedinvnet.codes.registry import OURS
from codedinvnet.common.files import read_json
from codedinvnet.data.load import KNOWN
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.grid import latest, read_rows
from codedinvnet.evaluation.quantiles import clustered_ci

SIZES = (2, 4, 10)
FILES = ("accuracy.jsonl", "equal-cost.jsonl")
SPENDS = "spends, " + " / ".join(f"k = {k}" if k == SIZES[0] else str(k) for k in SIZES)
BACKUPS = ("small-backup", "small-backup@1.4")
"""At the cost of one query, and at about what f and E of a code cost for a group of ten."""
OWN = (BACKUPS[1], "collage", "collage@1.4", "superposition")
"""Methods that only these tables show, whichever file has their rows."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "1": (
        *(BACKUPS[0], "collage", "superposition", "parm", "average-image"),
        *("approxifer", "nercc"),
    ),
    "1.4": (BACKUPS[1], "collage@1.4"),
    "its own": (OURS, "coded-invnet-paper"),
}
"""The methods by what they may spend: a code's f and E cost what they cost."""
LEFT_OUT = ("none", "replication", "oracle", "approxifer-byzantine")
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
    again = []
    for name in found["dataset"].unique():
        path = folder / f"seed-{name}.json"
        reports = read_json(path) if path.is_file() else {}
        for k in SIZES:
            if report := reports.get(f"test_k{k}"):
                value = 100 * report["recovered_accuracy"]
                again.append([name, "invertible", OURS, k, value, None, None])
    own = found[COLUMNS].astype({"recovered": float, "normal": float})
    return concat([own, DataFrame(again, columns=COLUMNS).astype(own.dtypes)]) if again else own


def _sets(frame: DataFrame) -> list[str]:
    known = list(KNOWN)
    order = {name: (known.index(name) if name in known else len(known), name) for name in known}
    return sorted(frame["dataset"].unique(), key=lambda name: order.get(name, (len(known), name)))


def _spent(frame: DataFrame) -> str:
    values = frame["spends"].dropna()
    return f"{values.iloc[-1]:.2f}" if len(values) else "–"


def _cell(values: Series) -> str:
    """Return the mean of trainings with its 95 % interval, and their number."""
    if values.empty:
        return "not measured"
    half = clustered_ci(list(values), fewest=2)
    return f"{values.mean():.2f}{'' if half is None else f' ± {half:.2f}'} ({len(values)})"


def table(folder: Path) -> str:
    """Return what methods spend and recover at each group size, and over how many trainings."""
    frame = trainings(folder)
    frame = frame[frame["base"] == "invertible"]
    known = {*LEFT_OUT, *(name for names in GROUPS.values() for name in names)}
    others = [name for name in frame["label"].unique() if name not in known]
    lines = []
    for dataset in _sets(frame):
        for cost, methods in {**GROUPS, "–": others}.items():
            for method in methods:
                own = frame[(frame["dataset"] == dataset) & (frame["label"] == method)]
                sizes = {k: own[own["k"] == k] for k in SIZES}
                if len(own):
                    lines.append(
                        {
                            **{"data set": dataset, "may spend": cost, "method": method},
                            SPENDS: " / ".join(map(_spent, sizes.values())),
                            **{f"k = {k}": _cell(one["recovered"]) for k, one in sizes.items()},
                        }
                    )
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
    frame = frame[frame["base"] == "invertible"].set_index(["dataset", "k", "label"])["recovered"]
    lines = []
    for dataset in _sets(frame.reset_index()):
        direct = [plain.get((dataset, base), float("nan")) for base in ("resnet", "invertible")]
        price = direct[0] - direct[1]
        for k in SIZES:
            own = {
                name: list(frame[frame.index == (dataset, k, name)]) for name in (OURS, *BACKUPS)
            }
            if own[OURS] and any(own[name] for name in BACKUPS):
                cells = {f"code − {name}": _margin(own[OURS], own[name]) for name in BACKUPS}
                told = "not measured" if isna(price) else f"{price:.2f}"
                lines.append({"data set": dataset, "k": str(k), **cells, "price of f": told})
    return tables.markdown(DataFrame(lines))
