"""What backups are worth: agreement, coverage and accuracy, with 95 % intervals.

Thresholds and the recommendation are chosen on calibration inputs; what is reported was seen on
test inputs, which had no part in any choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from codedinvnet.protect.costs import Interval

AGREEMENTS = (0.95, 0.99, 0.995)
"""Agreements at which coverage is reported."""
CHOSEN_AT, CLOSE = 0.99, 0.02
"""The recommended backup is the quickest whose coverage at 0.99 is within 2 points of the best."""
NEGLIGIBLE = 1.0
"""Milliseconds by which a backup may be slower than the model."""
LATE = (0.01, 0.02, 0.04)
"""Share of the queries that are late, and so go to the backup under `auto`: low, usual, high."""
DISAGREE = 2.0
"""Multiply-adds and time disagree if a backup's share of one is this times that of the other."""


class Answers(NamedTuple):
    """A backup's answers to some inputs."""

    confidence: np.ndarray
    """How sure the backup is, (N,)."""
    agrees: np.ndarray
    """Whether the answers are the served model's, (N,)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A measured backup.

    Attributes:
        name: of its row.
        digest: of its file.
        ms: of one query.
        model_ms: of one query to the served model, timed in turn with the backup.
        calibration: its answers to the calibration inputs.
        test: its answers to the test inputs.
        macs: its multiply-adds.
        model_macs: the served model's; None if unknown.
        note: what a reader of the row should know; "" for nothing.
        extra: what the task reports of its answers to the test inputs.
    """

    name: str
    digest: str
    ms: Interval
    model_ms: Interval
    calibration: Answers
    test: Answers
    macs: int
    model_macs: int | None = None
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> float:
        """Its share of the served model's multiply-adds; of its time if these are unknown."""
        if self.model_macs is None:
            return self.ms.value / self.model_ms.value
        return self.macs / self.model_macs


def interval(hits: np.ndarray) -> Interval:
    """Return the share of hits (N,) with Wilson's interval."""
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return Interval(float(hits.mean()), float(low), float(high))


def threshold(confidence: np.ndarray, agrees: np.ndarray, agreement: float) -> float:
    """Return the lowest confidence from which answers agree so often; infinity if none does."""
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    shares = np.cumsum(agrees[order]) / np.arange(1, len(order) + 1)
    last = np.append(ordered[1:] != ordered[:-1], True)  # equal ones are released together
    enough = np.flatnonzero((shares >= agreement) & last)
    return float(ordered[enough[-1]]) if len(enough) else math.inf


def coverage_at(confidence: np.ndarray, agrees: np.ndarray, agreement: float) -> float:
    """Return the largest share of these answers that agree so often."""
    return float((confidence >= threshold(confidence, agrees, agreement)).mean())


def report(candidate: Candidate, k: int) -> dict[str, Any]:
    """Return a backup's row of the table, as JSON has it.

    Policies that send the backup everything do so in groups of k, and need as many workers for it
    as answer for a group in the time of one query to the model.
    """
    test, work = candidate.test, candidate.work
    row: dict[str, Any] = {
        "method": candidate.name,
        "digest": candidate.digest,
        "work": work,
        "macs": candidate.macs,
        "ms": candidate.ms,
        "model_ms": candidate.model_ms,
        "k": k,
        "backup_workers": max(1, min(k, math.ceil(work * k - 0.01))),
        "inputs": len(test.agrees),
        "agreement": interval(test.agrees),
        **candidate.extra,
        "coverage": {},
        "extra_work": {
            "auto": Interval(LATE[1] * work, LATE[0] * work, LATE[2] * work),
            "small-backup": Interval(work, work, work),
        },
    }
    for agreement in AGREEMENTS:
        least = threshold(*candidate.calibration, agreement)
        released = test.confidence >= least
        row["coverage"][str(agreement)] = {
            "threshold": least if math.isfinite(least) else None,
            "coverage": interval(released),
            "agreement": interval(test.agrees[released]) if released.any() else None,
        }
    notes = [candidate.note] if candidate.note else []
    time = candidate.ms.value / candidate.model_ms.value
    if not 1 / DISAGREE <= time / work <= DISAGREE:
        notes.append(
            f"{work:.2f} of the model's multiply-adds, which the budget used, and {time:.2f} of "
            "its time"
        )
    if notes:
        row["note"] = f"{candidate.name}: {'; '.join(notes)}"
    return row


def recommend(candidates: Sequence[Candidate], chance: float) -> tuple[str | None, str]:
    """Choose the backup for `auto`, by the calibration inputs; return its name and the reason.

    Of the backups whose coverage at CHOSEN_AT is within CLOSE of the best, the quickest is taken,
    because a late client waits for it; of those that are as quick by their intervals, the one with
    the best coverage. If no confidence is enough for CHOSEN_AT, agreement takes the place of
    coverage. A backup must not be slower than the model by more than NEGLIGIBLE, and must surely
    agree more often than one and the same answer to all inputs, which does by chance, or there is
    none to recommend.
    """
    useful = [
        candidate
        for candidate in candidates
        if candidate.ms.low <= candidate.model_ms.high + NEGLIGIBLE
        and interval(candidate.calibration.agrees).low > chance
    ]
    if not useful:
        return None, (
            "no backup is as quick as the model and better than one answer to all inputs: use "
            "policy hedge"
        )
    what = f"coverage at {CHOSEN_AT}"
    value = {c.name: coverage_at(*c.calibration, CHOSEN_AT) for c in useful}
    if not any(value.values()):
        what = "agreement"
        value = {c.name: float(c.calibration.agrees.mean()) for c in useful}
    close = [c for c in useful if value[c.name] >= max(value.values()) - CLOSE]
    quickest = min(close, key=lambda candidate: candidate.ms.value)
    as_quick = (c for c in close if c.ms.low <= quickest.ms.high)
    chosen = max(as_quick, key=lambda candidate: value[candidate.name])
    return chosen.name, (
        f"the quickest within {100 * CLOSE:.0f} points of the best {what}; it agrees with the "
        f"model on {100 * float(chosen.test.agrees.mean()):.1f} % of the test inputs"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for a reader, as Markdown."""

    def percent(found: Sequence[float]) -> str:
        value, low, high = (f"{100 * share:.1f}" for share in found)
        return value if low == high else f"{value} ({low} to {high})"

    heads = ["backup", "multiply-adds", "ms of one query", "agreement %"]
    heads += [f"coverage at {agreement}, %" for agreement in AGREEMENTS]
    heads += ["extra work under `auto`, %", "under `small-backup`, %"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        median, low, high = row["ms"]
        cells = [row["method"], f"{row['macs']:,}"]
        cells += [f"{median:.3f} ({low:.3f} to {high:.3f})", percent(row["agreement"])]
        cells += [percent(found["coverage"]) for found in row["coverage"].values()]
        cells += [percent(row["extra_work"][policy]) for policy in ("auto", "small-backup")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
