"""What backups are worth: agreement, coverage and accuracy, with 95 % intervals.

Thresholds and the recommendation are chosen on calibration inputs; what is reported was seen on
test inputs, which had no part in any choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from codedinvnet.protection.bound import Curve
from codedinvnet.protection.costs import MOST_TIME, Interval, too_slow

AGREEMENTS = (0.95, 0.99, 0.995)
"""Agreements at which coverage is reported."""
LIMITS, RELEASED = (0.01, 0.02, 0.05), 0.5
"""A backup is useful if one of these limits on disagreement, as `serve` keeps them, releases at
least this share of its answers; the lowest such limit is suggested."""
CLOSE = 0.02
"""The recommended backup is the quickest that releases within 2 points of the best."""


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
        note: what a reader of the row should know; "" for nothing.
        extra: what the task reports of its answers to the test inputs.
    """

    name: str
    digest: str
    ms: Interval
    model_ms: Interval
    calibration: Answers
    test: Answers
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> float:
        """Its share of the served model's time."""
        return self.ms.value / self.model_ms.value

    @cached_property
    def curve(self) -> Curve:
        """What the calibration inputs say of its answers."""
        return Curve.of(self.calibration.confidence[:, None], self.calibration.agrees[:, None])

    def released(self, limit: float) -> float:
        """Return the share of the calibration inputs that a limit on disagreement releases."""
        return float((self.calibration.confidence >= self.curve.threshold(limit)).mean())


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
        "ms": candidate.ms,
        "model_ms": candidate.model_ms,
        "k": k,
        "backup_workers": max(1, min(k, math.ceil(work * k - 0.01))),
        "inputs": len(test.agrees),
        "agreement": interval(test.agrees),
        **candidate.extra,
        "coverage": {},
        "limits": {},
    }
    for agreement in AGREEMENTS:
        least = threshold(*candidate.calibration, agreement)
        row["coverage"][str(agreement)] = _seen(test, least, agreement)
    for limit in LIMITS:
        row["limits"][str(limit)] = _seen(test, candidate.curve.threshold(limit), 1 - limit)
    if note := candidate.note or too_slow(work):
        row["note"] = f"{candidate.name}: {note}"
    return row


def _seen(test: Answers, least: float, agreement: float) -> dict[str, Any]:
    """Return what the test inputs show of a threshold, and whether it misses the agreement."""
    released = test.confidence >= least
    shown = interval(test.agrees[released]) if released.any() else None
    return {
        "threshold": least if math.isfinite(least) else None,
        "coverage": interval(released),
        "agreement": shown,
        "missed": shown is not None and shown.high < agreement,
    }


class Recommendation(NamedTuple):
    """The backup for `auto`, if there is one, with the limit on disagreement that suits it."""

    backup: str | None
    limit: float | None
    reason: str


def recommend(candidates: Sequence[Candidate], chance: float) -> Recommendation:
    """Choose the backup for `auto`, by the calibration inputs.

    A backup is useful if it takes at most half of the model's time, surely agrees more often than
    one and the same answer to all inputs, and if a limit releases most of its answers. Of those
    that release within CLOSE of the best at the lowest such limit, the quickest is taken, because
    a late client waits for it; of those that are as quick by their intervals, the best one.
    """
    better = "a copy of the model is better: use hedging (policy hedge)"
    quick = [c for c in candidates if not too_slow(c.work)]
    if not quick:
        return Recommendation(
            None, None, f"no backup takes at most {MOST_TIME:g} of the model's time: {better}"
        )
    useful = [c for c in quick if interval(c.calibration.agrees).low > chance]
    if not useful:
        return Recommendation(
            None,
            None,
            f"one and the same answer to all inputs would agree {100 * chance:.0f} % of the time, "
            f"and no quick backup is surely better: {better}",
        )
    for limit in LIMITS:
        value = {c.name: c.released(limit) for c in useful}
        if (best := max(value.values())) < RELEASED:
            continue
        close = [c for c in useful if value[c.name] >= best - CLOSE]
        quickest = min(close, key=lambda candidate: candidate.ms.value)
        as_quick = (c for c in close if c.ms.low <= quickest.ms.high)
        chosen = max(as_quick, key=lambda candidate: value[candidate.name])
        released = 100 * value[chosen.name]
        return Recommendation(
            chosen.name,
            limit,
            f"the quickest within {100 * CLOSE:.0f} points of the best; at a limit of "
            f"{100 * limit:g} % it may answer {released:.0f} % of the late queries",
        )
    count, highest = len(quick[0].calibration.agrees), 100 * LIMITS[-1]
    return Recommendation(
        None,
        None,
        f"no quick backup may answer {100 * RELEASED:.0f} % of the late queries at a limit of "
        f"{highest:g} %, as {count} calibration inputs show it: {better}, or give more inputs",
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for a reader, as Markdown."""

    def percent(found: Sequence[float]) -> str:
        value, low, high = (f"{100 * share:.1f}" for share in found)
        return value if low == high else f"{value} ({low} to {high})"

    def seen(found: Mapping[str, Any]) -> str:
        if found["agreement"] is None:
            return "0"
        missed = ", MISSED" if found["missed"] else ""
        return f"{percent(found['coverage'])}; {percent(found['agreement'])} agree{missed}"

    heads = ["backup", "ms of one query", "of the model's", "agreement %"]
    heads += [f"released at a limit of {100 * limit:g} %, %" for limit in LIMITS]
    heads += [f"coverage at {agreement}, %" for agreement in AGREEMENTS]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        median, low, high = row["ms"]
        cells = [row["method"], f"{median:.3f} ({low:.3f} to {high:.3f})", f"{row['work']:.2f}"]
        cells.append(percent(row["agreement"]))
        cells += [seen(found) for part in ("limits", "coverage") for found in row[part].values()]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
