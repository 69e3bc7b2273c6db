"""The tables of equal cost: what methods recover when the extra worker may spend the same.

They are made of `accuracy.jsonl` and `equal-cost.jsonl`, and of what the bundles' trainings from
another seed reached (`seed-NAME.json`). The unit of cost is a query of the served model, in
multiply-adds. All of it is on the bundles' own f and g, with one worker missing.

What a method may spend is not what it spends: a network's width is a whole number, and a code's f
and E have the cost that they have. So the multiply-adds of each are counted. Those of decoding are
not: they are the front end's. For each missing answer they are at most 0.02 of a query, and 0.04
where g answers (the average image on CIFAR-10; on Tiny-ImageNet it would be 0.18).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from benchmarks.bundles import another_seed
from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.berrut import ApproxIFER, RobustApproxIFER
from codedinvnet.codes.collage import Collage
from codedinvnet.codes.invnet import AverageImage, CodedInvNet, PaperInvNet
from codedinvnet.codes.nercc import NeRCC
from codedinvnet.codes.oracle import Oracle
from codedinvnet.codes.parm import ParM
from codedinvnet.codes.plain import Plain, Replication
from codedinvnet.codes.superposition import Superposition
from codedinvnet.data.load import KNOWN
from codedinvnet.evaluation import tables
from codedinvnet.rows import Row, current_accuracy, read_rows

SIZES = (2, 4, 10)
FILES = ("accuracy.jsonl", "equal-cost.jsonl")
SPENDS = "spends, " + " / ".join(f"k = {k}" if k == SIZES[0] else str(k) for k in SIZES)
DEAR = 1.4
"""What f and E of a code cost together for a group of ten, about."""
BACKUPS = {1.0: SmallBackup.name, DEAR: f"{SmallBackup.name}@{DEAR}"}
OWN = (
    *(BACKUPS[DEAR], Collage.name, f"{Collage.name}@{DEAR}"),
    *(Superposition.name, f"{Superposition.name}@{DEAR}"),
)
"""The methods that are for these tables alone, whichever file has their rows."""
ON_ONE_F = ", on one f"
"""What a verdict says if the backups' trainings share one f: their interval is too narrow then."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "1": (
        *(BACKUPS[1.0], Collage.name, Superposition.name, ParM.name),
        *(AverageImage.name, ApproxIFER.name, NeRCC.name),
    ),
    f"{DEAR:g}": (*(BACKUPS[DEAR], f"{Collage.name}@{DEAR}", f"{Superposition.name}@{DEAR}"),),
    "its own": (CodedInvNet.name, PaperInvNet.name),
}
"""The methods by what they may spend: a code's f and E cost what they cost."""
LEFT_OUT = frozenset(method.name for method in (Plain, Replication, Oracle, RobustApproxIFER))
"""Those that the table does not show: bounds, and what needs more than one extra worker."""


class Results:
    """What a folder of results says, in %.

    Args:
        folder: where the rows lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recovered: dict[tuple[str, str, int], list[float]] = {}
        """(data set, method, k) -> the recovered accuracy of each training."""
        self.around_resnet: dict[tuple[str, str, int], list[float]] = {}
        """The same of what makes up for late answers of the plain ResNet."""
        self.normal: dict[tuple[str, str], float] = {}
        """(data set, base model) -> the accuracy of direct answers."""
        self.rows: dict[tuple[str, str, int], Row] = {}
        """(data set, method, k) -> the last row of the recovered accuracies."""
        both = [row for name in FILES for row in read_rows(folder / name, "accuracy")]
        both.sort(key=lambda row: str(row.get("began", "")))  # the latest row says what counts
        for row in current_accuracy(both):
            if row["error"] is None and not row["settings"]["quick"]:
                self._add(row)
        self.datasets = sorted({place[0] for place in self.recovered}, key=_order)
        for dataset in self.datasets:
            self._add_other_seed(dataset)

    def _add(self, row: Row) -> None:
        if row["label"] == Plain.name:
            self.normal[row["dataset"], row["base"]] = 100 * row["normal"]
        if (row["missing"], row["corrupt"]) == (1, 0):
            place = (row["dataset"], row["label"], row["k"])
            own = row["base"] == "invertible"
            found = self.recovered if own else self.around_resnet
            found.setdefault(place, []).append(100 * row["recovered"])
            if own:
                self.rows[place] = row

    def _add_other_seed(self, dataset: str) -> None:
        """Add a bundle's training from another seed, where it was measured as the rows were."""
        found = another_seed(self.folder, dataset)
        for k in SIZES:
            place = (dataset, CodedInvNet.name, k)
            report = found.get(f"test_k{k}")
            if place in self.rows and report and _measured_alike(self.rows[place], report):
                self.recovered[place].append(100 * report["recovered_accuracy"])

    def spent(self, dataset: str, method: str, k: int) -> float:
        """Return what the extra worker computes for a full group, in queries of g(f(x)).

        NaN if that was not measured, or if the row is of before rows told it.
        """
        row = self.rows.get((dataset, method, k))
        return tables.spent([row] if row else [])

    def spends(self, dataset: str, k: int, rival: str) -> str:
        """Return what the code and a rival of it spend, for a table's cell; "" if not known."""
        pair = [self.spent(dataset, method, k) for method in (CodedInvNet.name, rival)]
        return "" if any(map(math.isnan, pair)) else "; {:.2f} against {:.2f}".format(*pair)


def _measured_alike(row: Row, report: Mapping[str, Any]) -> bool:
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


def half_width(*samples: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean over trainings, or of a difference of two means.

    Student's t, for a difference as Welch has it; NaN if a sample is of one training.
    """
    from scipy.stats import t as student

    if min(map(len, samples)) < 2:
        return math.nan
    parts = [statistics.variance(values) / len(values) for values in samples]
    total = sum(parts)
    if not total:
        return 0.0
    shares = (part**2 / (len(values) - 1) for part, values in zip(parts, samples, strict=True))
    return float(student.ppf(0.975, total**2 / sum(shares))) * math.sqrt(total)


def table(folder: Path) -> str:
    """Return what methods spend and recover at each group size, and over how many trainings.

    A ± is half of a 95 % interval over the trainings, whose number stands in brackets. Methods of
    which nothing was measured are left out, and so are those of LEFT_OUT. Others, such as methods
    of one's own, come last.
    """
    results = Results(folder)
    known = LEFT_OUT.union(*GROUPS.values())
    others = dict.fromkeys(name for _, name, _ in results.recovered if name not in known)
    lines = []
    for dataset in results.datasets:
        for cost, methods in {**GROUPS, "–": (*others,)}.items():
            for method in methods:
                own = [results.recovered.get((dataset, method, k)) for k in SIZES]
                if not any(own):
                    continue
                spent = [results.spent(dataset, method, k) for k in SIZES]
                lines.append(
                    {
                        **{"data set": dataset, "may spend": cost, "method": method},
                        SPENDS: " / ".join("–" if math.isnan(s) else f"{s:.2f}" for s in spent),
                        **{f"k = {k}": _cell(v) for k, v in zip(SIZES, own, strict=True)},
                    }
                )
    return tables.markdown(DataFrame(lines)) if lines else ""


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return "not measured"
    half = half_width(values)
    spread = "" if math.isnan(half) else f" ± {half:.2f}"
    return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


def margins(folder: Path) -> str:
    """Return how far the code is ahead of the backups, and where it pays for its f.

    A plain ResNet of f's cost answers directly more often right than f and g: that is the price of
    f. Whoever keeps the ResNet has a backup of it. So the code must be ahead of the dearest backup,
    of the ResNet where that was measured, else of f and g. Behind each margin stands what the two
    spend: a code's f and E cost what they cost, at every group size.
    """
    results = Results(folder)
    lines = []
    for dataset in results.datasets:
        price = results.normal.get((dataset, "resnet"), math.nan)
        price -= results.normal.get((dataset, "invertible"), math.nan)
        for k in SIZES:
            code = results.recovered.get((dataset, CodedInvNet.name, k))
            rivals = {
                name: theirs
                for name in BACKUPS.values()
                if (theirs := results.recovered.get((dataset, name, k)))
            }
            if not code or not rivals:
                continue
            dearest = list(rivals)[-1]
            resnets = results.around_resnet.get((dataset, dearest, k))
            cells = {
                name: _margin(code, rivals[name]) + results.spends(dataset, k, name)
                if name in rivals
                else "not measured"
                for name in BACKUPS.values()
            }
            lines.append(
                {
                    **{"data set": dataset, "k": str(k)},
                    **{f"code − {name}": cell for name, cell in cells.items()},
                    "price of f": "not measured" if math.isnan(price) else f"{price:.2f}",
                    "pays from": _pays(price, code, list(rivals.values()), resnets),
                }
            )
    return tables.markdown(DataFrame(lines)) if lines else ""


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.fmean(ours) - statistics.fmean(theirs)


def _margin(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return how far the code is ahead of a backup, whose trainings all have the bundle's f."""
    margin, half = _difference(ours, theirs), half_width(ours, theirs)
    if math.isnan(half):
        once = [name for name, values in (("code", ours), ("backup", theirs)) if len(values) < 2]
        return f"{margin:+.2f} ({once[0] if len(once) == 1 else 'each'} trained once)"
    verdict = "ahead" if margin > half else "behind" if margin < -half else "open"
    shared = "" if verdict == "open" else ON_ONE_F
    return f"{margin:+.2f} ± {half:.2f} ({verdict}{shared})"


def _pays(
    price: float,
    ours: Sequence[float],
    rivals: Sequence[Sequence[float]],
    resnets: Sequence[float] | None,
) -> str:
    """Return which share of late answers makes up for the price of f, if the code is ahead.

    Args:
        price: how much more often the plain ResNet's direct answers are right, in points.
        ours: what the code recovered, of each training.
        rivals: the same of backups of one f, the dearest last. One that is ahead of the code by
            more than the interval settles it.
        resnets: the same of the dearest backup of plain ResNets, if that was measured: it takes the
            place of the last rival. Each of its trainings has a ResNet of its own.
    """

    def behind(theirs: Sequence[float]) -> bool:
        return _difference(ours, theirs) < -half_width(ours, theirs)

    if resnets is not None and behind(resnets):
        return "nowhere"
    if any(map(behind, rivals)):
        return f"nowhere{ON_ONE_F}"
    theirs, shared = (rivals[-1], ON_ONE_F) if resnets is None else (resnets, "")
    margin, half = _difference(ours, theirs), half_width(ours, theirs)
    if not margin > half:
        return "open"
    if math.isnan(price):
        return "not measured"
    share = f"{100 * price / (price + margin):.0f} % late answers" if price > 0 else "everywhere"
    return share + shared
