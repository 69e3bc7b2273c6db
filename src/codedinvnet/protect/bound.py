"""The confidence from which approximate answers may be released at an agreed rate of disagreement.

Held-out inputs are answered approximately and directly. A `Curve` keeps, for falling thresholds on
the approximate answer's confidence, how many answers would be released, and how many of them
disagree. From it come the threshold for any limit, and the probability that an answer agrees.

The threshold is found by Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021, arXiv
2110.01052) with fixed-sequence testing: thresholds fall from a strict one until the first that
cannot be shown to keep the limit. A threshold is shown to keep it by an exact test. Conformal risk
control (Angelopoulos et al., ICLR 2024) bounds the mean over calibrations alone, and asks for a
loss that falls with the threshold, which a share of the released is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

RISK = 0.04
"""The probability, over calibrations, that a given threshold passes and does not keep its limit.

It bounds the expected share of the chosen threshold as well. The share over the next answers may be
higher than that, and its bound is of a threshold given beforehand. Choosing one adds about a
hundredth (`python -m benchmarks trust` measures it), which is why this is not 0.05.
"""
HORIZON = 10_000
"""The limit is kept over so many answers after the calibration, those not released among them."""
LEVELS = 200
"""Thresholds of a curve: they are that many quantiles of the confidences."""
LEFT = 0.9
"""The share of the released answers that half the limit must leave if it is to be used."""
SPARE = 4
"""The first threshold releases so many answers that this many disagreements are borne."""


class Coverage(NamedTuple):
    """What a limit on disagreement lets through."""

    share: float
    """The share of the approximate answers that is released."""
    disagreement: float
    """The share of the released that disagreed in the calibration."""
    threshold: float
    """The least confidence that is released; infinity if nothing is."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Disagreement of held-out answers by threshold on their confidence.

    Attributes:
        thresholds: (T,) falling confidences.
        released: (T,) answers at or above each.
        disagreed: (T,) those of them that differ from the direct answer.
        spread: the variance of a group's disagreements, by that of as many independent answers.
            Members of a group share its extra task, so it may exceed 1.
    """

    thresholds: np.ndarray
    released: np.ndarray
    disagreed: np.ndarray
    spread: float = 1.0

    @classmethod
    def of(cls, confidences: np.ndarray, agrees: np.ndarray, levels: int = LEVELS) -> Curve:
        """Make a curve of held-out answers in groups, (G, k) each."""
        order = np.argsort(-confidences, axis=None, kind="stable")
        sorted_confidences = confidences.ravel()[order]
        ends = np.unique(np.ceil(np.arange(1, levels + 1) * order.size / levels).astype(int))
        thresholds = np.unique(sorted_confidences[ends - 1])[::-1]
        released = np.searchsorted(-sorted_confidences, -thresholds, side="right")
        disagreed = np.cumsum(~agrees.ravel()[order])[released - 1]
        return cls(thresholds, released, disagreed, spread_of(~agrees))

    def keeps(self, limit: float, risk: float = RISK, horizon: int | None = HORIZON) -> np.ndarray:
        """Tell, by threshold, whether it is shown to keep a limit.

        Args:
            limit: the share of the released answers that may disagree.
            risk: the probability of a wrong yes.
            horizon: the later answers over which the share is counted; None: their expectation.
        """
        seen = np.floor(self.released / self.spread)
        wrong = np.minimum(np.ceil(self.disagreed / self.spread), seen)
        return self._chance(seen, wrong, limit, horizon) <= risk

    def _chance(
        self, seen: np.ndarray, wrong: np.ndarray, limit: float, horizon: int | None
    ) -> np.ndarray:
        """Return the largest chance of so few disagreements at thresholds that break the limit.

        If D of the released answers disagree, those of the calibration are a draw without
        replacement from all. The fewest D that break the limit leave floor(limit · later) + 1 to
        the later ones.
        """
        from scipy.special import bdtr  # a service without a limit does not need it

        expected = np.asarray(bdtr(wrong, seen.astype(int), limit))
        if horizon is None:
            return expected
        later = np.maximum(np.round(horizon * seen / max(seen[-1], 1) / self.spread), 1)
        broken = wrong + np.floor(limit * later) + 1
        rows = np.stack([wrong, seen, later, broken], 1)
        chances: np.ndarray = np.maximum(expected, [few_chance(*row) for row in rows])
        return chances

    def threshold(self, limit: float, risk: float = RISK, horizon: int | None = HORIZON) -> float:
        """Return the least confidence that may be released; infinity if none may be."""
        kept = self.keeps(limit, risk, horizon)
        seen = np.floor(self.released / self.spread)
        spare = self._chance(seen, np.minimum(SPARE, seen), limit, horizon) <= risk
        if not spare.any():
            return math.inf
        first = int(np.argmax(spare))
        failed = np.flatnonzero(~kept[first:])
        last = first + int(failed[0]) - 1 if failed.size else len(kept) - 1
        return float(self.thresholds[last]) if last >= first else math.inf

    @property
    def disagreement(self) -> float:
        """The share of all answers of the calibration that disagreed."""
        return float(self.disagreed[-1] / self.released[-1])

    def coverage(self, limit: float) -> Coverage:
        """Return what a limit lets through of answers like those of the calibration."""
        threshold = self.threshold(limit)
        if math.isinf(threshold):
            return Coverage(0.0, 0.0, threshold)
        last = int(np.flatnonzero(self.thresholds >= threshold)[-1])
        released = int(self.released[last])
        share = released / int(self.released[-1])
        return Coverage(share, int(self.disagreed[last]) / released, threshold)

    def strict_threshold(self, limit: float) -> float:
        """Return the least confidence that is released while disagreement is above the limit.

        It is that of half the limit, unless too little would be left; then it is the limit's own.
        """
        own, half = self.coverage(limit), self.coverage(limit / 2)
        return (half if half.share >= LEFT * own.share else own).threshold

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The probability, (T,), that an answer between two thresholds agrees.

        It is an isotonic regression of agreement on confidence, with half an answer of either kind
        added to each of its steps, so that it is never 0 or 1.
        """
        counts = np.diff(self.released, prepend=0)
        wrong = np.diff(self.disagreed, prepend=0)
        steps: list[list[float]] = []  # answers, disagreements, thresholds; the share of them rises
        for count, lost in zip(counts.tolist(), wrong.tolist(), strict=True):
            steps.append([count, lost, 1])
            while len(steps) > 1 and steps[-2][1] * steps[-1][0] >= steps[-1][1] * steps[-2][0]:
                last = steps.pop()
                steps[-1] = [a + b for a, b in zip(steps[-1], last, strict=True)]
        shares = [1 - (lost + 0.5) / (count + 1) for count, lost, _ in steps]
        repeated = np.repeat(shares, [int(width) for *_, width in steps])
        return np.minimum.accumulate(repeated)

    def probability(self, confidences: np.ndarray) -> np.ndarray:
        """Return the calibrated probability that answers of these confidences agree."""
        steps = self.probabilities
        place = np.searchsorted(-self.thresholds, -confidences, side="left")
        return np.asarray(steps[np.minimum(place, len(steps) - 1)])


def few_chance(wrong: float, seen: float, later: float, broken: float) -> float:
    """Return the chance that at most `wrong` of `broken` lie in `seen` of `seen + later` draws.

    scipy's hypergeometric distribution says the same a thousand times slower.
    """
    if broken > seen + later:
        return 0.0
    found = np.arange(max(0.0, broken - later), min(wrong, seen) + 1)
    ways = _choose(seen, found) + _choose(later, broken - found) - _choose(seen + later, broken)
    return min(1.0, float(np.exp(ways).sum()))


def _choose(n: float, m: np.ndarray | float) -> np.ndarray:
    from scipy.special import gammaln

    return np.asarray(gammaln(n + 1) - gammaln(m + 1) - gammaln(n - np.asarray(m) + 1))


def spread_of(disagrees: np.ndarray) -> float:
    """Return the variance of groups' disagreements (G, k) by the binomial one; at least 1."""
    share = disagrees.mean()
    expected = disagrees.shape[1] * share * (1 - share)
    if len(disagrees) < 2 or not expected:
        return 1.0
    return max(1.0, float(disagrees.sum(1).var(ddof=1) / expected))


def oracle_coverage(confidences: np.ndarray, agrees: np.ndarray, limit: float) -> float:
    """Return the largest share of these very answers that a threshold can release."""
    order = np.argsort(-confidences, axis=None, kind="stable")
    found, wrong = confidences.ravel()[order], np.cumsum(~agrees.ravel()[order])
    count = np.arange(1, order.size + 1)
    last = np.append(found[1:] != found[:-1], True)  # equal ones are released together
    kept = np.flatnonzero((wrong <= limit * count) & last)
    return float(count[kept[-1]] / order.size) if kept.size else 0.0
