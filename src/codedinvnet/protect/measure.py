"""What approximate answers are worth: agreement, coverage and accuracy, with 95 % intervals.

Thresholds and the recommended method are chosen on calibration inputs. What is reported was seen on
test inputs, which had no part in any choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

AGREEMENTS = (0.95, 0.99, 0.995)
"""Agreements at which coverage is told."""
NONE = -1
"""The answer of scores that are not finite: it agrees with nothing, and has the confidence 0."""
Z = 1.96
DEAREST = 0.5
"""Work for a query from which on the served model's own copy is the better backup."""
CLOSE = 0.01
"""Difference within which two methods agree equally often, or are equally sure: a point."""


class Interval(NamedTuple):
    """A share, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """A method's answers to some inputs.

    Attributes:
        rows: the rows of the inputs, (N,).
        answers: the classes, (N,); NONE where scores were not finite.
        confidence: the highest probability, (N,).
        served: the served model's own answers, (N,).
        groups: the group of each; answers of one group were decoded together, (N,).
        labels: the right classes, (N,); None if nobody knows them.
    """

    rows: np.ndarray
    answers: np.ndarray
    confidence: np.ndarray
    served: np.ndarray
    groups: np.ndarray
    labels: np.ndarray | None = None

    @property
    def agrees(self) -> np.ndarray:
        """Whether the answers are the served model's, (N,)."""
        agrees: np.ndarray = self.answers == self.served
        return agrees


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method that may be recommended. Each is equal to itself alone.

    Attributes:
        name: the method's name.
        cost: work of its extra tasks for one query, in services of the served model.
        calibration: its answers to the calibration inputs.
        test: its answers to the test inputs.
        k: queries in a group that it is served with.
        backups: workers for a group's extra tasks.
        note: a line that a reader of the table must know; "" for none.
    """

    name: str
    cost: float
    calibration: Answers
    test: Answers
    k: int = 10
    backups: int = 1
    note: str = ""


def answers_of(
    log_probabilities: np.ndarray,
    rows: np.ndarray,
    served: np.ndarray,
    labels: np.ndarray | None,
    groups: np.ndarray | None = None,
) -> Answers:
    """Return the answers that scores give.

    Args:
        log_probabilities: (N, classes).
        rows: the rows of the inputs, (N,).
        served: the served model's answers to all inputs.
        labels: the right classes of all inputs; None if nobody knows them.
        groups: see `Answers`; None: each answer is alone.
    """
    highest = log_probabilities.max(axis=1)
    finite = np.isfinite(highest)
    return Answers(
        rows,
        np.where(finite, log_probabilities.argmax(axis=1), NONE),
        np.exp(np.where(finite, highest, -np.inf)),
        served[rows],
        np.arange(len(rows)) if groups is None else groups,
        None if labels is None else labels[rows],
    )


def interval(hits: np.ndarray, groups: np.ndarray) -> Interval:
    """Return the share of hits with Wilson's interval, for as many values as there really are.

    Answers of one group err together, so that they count for fewer than they are.

    Args:
        hits: (N,) of bool.
        groups: the group of each, (N,).
    """
    count = len(hits)
    if not count:
        return Interval(math.nan, 0.0, 1.0)
    share = float(hits.mean())
    _, which = np.unique(groups, return_inverse=True)
    sums = np.bincount(which, hits - share)
    spread = share * (1 - share) * count
    # If all are alike, nothing tells by how much those of a group are: they count for one.
    effect = max(1.0, float((sums**2).sum()) / spread) if spread > 0 else count / len(sums)
    n = count / effect
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def threshold(calibration: Answers, agreement: float) -> float:
    """Return the lowest confidence from which on the calibration answers agree so often.

    It is infinite if no confidence is enough.
    """
    order = np.argsort(-calibration.confidence, kind="stable")
    confidence = calibration.confidence[order]
    shares = np.cumsum(calibration.agrees[order]) / np.arange(1, len(order) + 1)
    last = np.append(confidence[1:] != confidence[:-1], True)  # equal ones are released together
    enough = np.flatnonzero((shares >= agreement) & last)
    return float(confidence[enough[-1]]) if len(enough) else math.inf


def report(candidate: Candidate) -> dict[str, Any]:
    """Return the row of a method in the table, as JSON has it."""
    test = candidate.test
    row: dict[str, Any] = {
        "method": candidate.name,
        "work": candidate.cost,
        "k": candidate.k,
        "backup_workers": candidate.backups,
        "agreement": interval(test.agrees, test.groups),
        "inputs": len(test.rows),
    }
    if test.labels is not None:
        row["accuracy"] = interval(test.answers == test.labels, test.groups)
    row["coverage"] = {}
    for agreement in AGREEMENTS:
        least = threshold(candidate.calibration, agreement)
        released = test.confidence >= least
        row["coverage"][str(agreement)] = {
            "threshold": least if math.isfinite(least) else None,
            "coverage": interval(released, test.groups),
            "agreement": interval(test.agrees[released], test.groups[released])
            if released.any()
            else None,
        }
    notes = [candidate.note] if candidate.note else []
    if share := float((test.answers == NONE).mean()):
        notes.append(
            f"{100 * share:.1f} % of the test inputs' scores by {candidate.name} are not finite: "
            "they count as disagreeing"
        )
    if notes:
        row["note"] = "; ".join(notes)
    return row


def difference(one: Answers, other: Answers) -> Interval:
    """Return by how much the first agrees more often, on the inputs of both, in pairs."""
    _, first, second = np.intersect1d(one.rows, other.rows, return_indices=True)
    groups = min(one.groups[first], other.groups[second], key=lambda g: len(np.unique(g)))
    gains = one.agrees[first].astype(float) - other.agrees[second]
    mean = float(gains.mean())
    _, which = np.unique(groups, return_inverse=True)
    half = Z * math.sqrt(float((np.bincount(which, gains - mean) ** 2).sum())) / len(gains)
    return Interval(mean, mean - half, mean + half)


def guesses(answers: Answers, most_frequent: int) -> Answers:
    """Return the answers of who always names the most frequent class."""
    named = np.full_like(answers.answers, most_frequent)
    return Answers(answers.rows, named, np.ones(len(named)), answers.served, answers.groups)


@dataclass(frozen=True)
class Recommendation:
    """Which method to use.

    Attributes:
        method: its name; None if none is worth it.
        reason: why, in one sentence.
    """

    method: str | None
    reason: str


def recommend(candidates: Sequence[Candidate], most_frequent: int) -> Recommendation:
    """Choose a method by the calibration inputs, and state what the test inputs show of it.

    A figure of the inputs that chose the method would be too high. Of the methods whose agreement
    is within CLOSE of the highest, the surest is taken. Of those whose `sureness` is within CLOSE
    of the highest, the cheapest is taken. A method that is not surely better than the most frequent
    class, or costs more than DEAREST, is not recommended.

    Args:
        candidates: all methods.
        most_frequent: the served model's most frequent answer to the training inputs.
    """
    useful = []
    for candidate in candidates:
        own = candidate.calibration
        gain = difference(own, guesses(own, most_frequent))
        if gain.low > 0 and candidate.cost <= DEAREST:
            useful.append(candidate)
    if not useful:
        return Recommendation(
            None,
            f"no method of at most {DEAREST} of the model's work is better than always answering "
            f"the most frequent class, {most_frequent}: use none (policy hedge)",
        )

    def agreement(candidate: Candidate) -> float:
        return float(candidate.calibration.agrees.mean())

    best = max(useful, key=agreement)

    def is_as_good(other: Candidate) -> bool:
        return difference(best.calibration, other.calibration).value <= CLOSE

    good = [c for c in useful if is_as_good(c)]
    common = functools.reduce(np.intersect1d, [c.calibration.rows for c in good])
    sure = [sureness(c.calibration, common) for c in good]
    surest = [c for c, its in zip(good, sure, strict=True) if its >= max(sure) - CLOSE]
    chosen = min(surest, key=lambda c: (c.cost, -agreement(c)))
    share = float(chosen.test.agrees.mean())
    reasons = [f"it agrees with the model on {100 * share:.1f} % of the test inputs"]
    if unsure := [c.name for c in good if c not in surest]:
        reasons.append(
            f"on the inputs that chose it, it agreed about as often as {', '.join(unsure)}, "
            "and was surer which of its answers agree"
        )
    if dearer := [c.name for c in surest if c.cost > chosen.cost]:
        reasons.append(f"it costs less than {', '.join(dearer)}, which did about as well there")
    others = [c for c in useful if c is not chosen]
    if others:
        rival = max(others, key=agreement)
        gap = difference(chosen.test, rival.test)
        reasons.append(
            f"{100 * gap.value:+.1f} points ({100 * gap.low:+.1f} to {100 * gap.high:+.1f}) "
            f"compared with {rival.name}"
        )
    rejected = [c.name for c in candidates if c not in useful]
    if rejected:
        reasons.append(
            f"left out: {', '.join(rejected)}, no better than always answering class "
            f"{most_frequent}, or more than {DEAREST} of the model's work"
        )
    return Recommendation(chosen.name, "; ".join(reasons))


def curve(confidence: np.ndarray, agrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coverage, rising, and the agreement of the most confident answers of that share.

    Answers of equal confidence come in no order: each counts as their mean.
    """
    _, which, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shares = np.bincount(which, agrees) / sizes
    counts = np.arange(1, len(which) + 1)
    return counts / len(which), np.cumsum(np.repeat(shares, sizes)) / counts


def sureness(answers: Answers, rows: np.ndarray) -> float:
    """Return the mean agreement over all coverages, for these rows alone.

    It is the area under the `curve`, and needs no threshold. Of two methods that agree equally
    often, the one whose confidence tells better which answers agree has the higher value.
    """
    chosen = np.isin(answers.rows, rows)
    return float(curve(answers.confidence[chosen], answers.agrees[chosen])[1].mean())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for a reader, as Markdown."""

    def percent(found: Interval | None) -> str:
        if found is None:
            return "none"
        return f"{100 * found[0]:.1f} ({100 * found[1]:.1f} to {100 * found[2]:.1f})"

    labelled = any("accuracy" in row for row in rows)
    heads = ["method", "work a query", "agreement %", *(["accuracy %"] if labelled else [])]
    heads += [f"coverage at {agreement}, %" for agreement in AGREEMENTS]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [row["method"], f"{row['work']:.3f}", percent(row["agreement"])]
        if labelled:
            cells.append(percent(row.get("accuracy")))
        for found in row["coverage"].values():
            cells.append(percent(found["coverage"]))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
