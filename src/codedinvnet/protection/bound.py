"""The confidence from which approximate answers may be released at a limit on disagreement.

Held-out inputs are answered approximately and directly. For falling thresholds on the approximate
answer's confidence, a `Curve` keeps how many answers would be released, and how many of them
disagree. From it come the threshold for any limit, and the probability that an answer agrees.

The threshold is found by Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021, arXiv
2110.01052) with fixed-sequence testing: thresholds fall from a strict one until an exact test can
no longer show that the limit is kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np

RISK = 0.04
"""The probability, over calibrations, that a given threshold passes and doesn't keep its limit.
Choosing the threshold added about a hundredth in 200 random splits of calibrations."""
HORIZON = 10_000
"""The limit is kept over so many answers after the calibration, released or not."""
LEVELS = 200
"""Thresholds of a curve: they are that many quantiles of the confidences."""
LEFT = 0.9
"""The share of the released answers that half the limit must leave if it is to be used."""
SPARE = 4
"""The first threshold that is tested releases so many answers that this many may disagree."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Disagreement of held-out answers by threshold on their confidence.

    Attributes:
        thresholds: (T,) falling confidences.
        released: (T,) answers at or above each.
        disagreed: (T,) those of them that differ from the direct answer.
        spread: the variance of a group's disagreements over that of as many independent answers.
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

    def threshold(self, limit: float, horizon: int = HORIZON) -> float:
        """Return the least confidence that may be released; infinity if none may be."""
        seen = np.floor(self.released / self.spread)
        wrong = np.minimum(np.ceil(self.disagreed / self.spread), seen)
        begins = self._chances(seen, np.minimum(SPARE, seen), limit, horizon) <= RISK
        if not begins.any():
            return math.inf
        first = int(np.argmax(begins))
        kept = self._chances(seen, wrong, limit, horizon)[first:] <= RISK
        count = len(kept) if kept.all() else int(np.argmin(kept))
        return float(self.thresholds[first + count - 1]) if count else math.inf

    def strict_threshold(self, limit: float) -> float:
        """Return the least confidence that is released while disagreement is above the limit.

        It is that of half the limit, unless too little would be left; then it is the limit's own.
        """
        own, half = self.threshold(limit), self.threshold(limit / 2)
        left, whole = (self.released[self.thresholds >= t].max(initial=0) for t in (half, own))
        return half if left >= LEFT * whole else own

    def _chances(
        self, seen: np.ndarray, wrong: np.ndarray, limit: float, horizon: int
    ) -> np.ndarray:
        """Return the largest chance of so few disagreements at thresholds that break the limit.

        Both the limit's expectation and its share over the later answers are tested. The answers of
        the calibration are a draw without replacement from all, and the fewest disagreements that
        break the limit leave floor(limit · later) + 1 to the later ones.
        """
        from scipy.special import bdtr  # a service without a limit does without scipy
        from scipy.stats import hypergeom

        expected = bdtr(wrong, seen.astype(int), limit)
        later = np.maximum(np.round(horizon * seen / max(seen[-1], 1) / self.spread), 1)
        broken = wrong + np.floor(limit * later) + 1
        possible = broken <= seen + later
        counted = hypergeom.cdf(wrong, seen + later, np.minimum(broken, seen + later), seen)
        chances: np.ndarray = np.maximum(expected, np.where(possible, counted, 0.0))
        return chances

    @property
    def disagreement(self) -> float:
        """The share of all answers of the calibration that disagreed."""
        return float(self.disagreed[-1] / self.released[-1])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """The probability, (T,), that an answer between two thresholds agrees.

        It is an isotonic regression of agreement on confidence by pooling adjacent violators, with
        half an answer of either kind added to each of its steps, so that it is never 0 or 1.
        """
        counts = np.diff(self.released, prepend=0)
        wrong = np.diff(self.disagreed, prepend=0)
        steps: list[list[float]] = []  # answers, disagreements, thresholds
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


def fewest(limit: float) -> int:
    """Return how many answers a limit needs at least, if all of them agree."""
    one, none = np.ones(1), np.zeros(1)
    counts = range(1, round(100 / limit))

    def enough(count: int) -> bool:
        return math.isfinite(Curve(one, one * count, none).threshold(limit))

    return counts[bisect_left(counts, True, key=enough)]


def spread_of(disagrees: np.ndarray) -> float:
    """Return the variance of groups' disagreements (G, k) over the binomial one; at least 1."""
    share = disagrees.mean()
    expected = disagrees.shape[1] * share * (1 - share)
    if len(disagrees) < 2 or not expected:
        return 1.0
    return max(1.0, float(disagrees.sum(1).var(ddof=1) / expected))
