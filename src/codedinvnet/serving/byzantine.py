"""Finds the worker whose answers are wrong, by a sequential test for each worker.

In a complete group the extra task by itself answers for every member, and each member's own worker
has answered as well. How often the two disagree with sound workers is known from the calibration,
by the confidence of the extra task's answer. For each worker the log-likelihood ratio of "it
changes `CHANGED` of its labels" to "it is sound" is summed up, never below 0 (Page's cumulative
sum, Biometrika 1954). A worker is named when its sum exceeds any other's by log(1 / false alarms).

- The extra task's worker has a sum of its own, for changing half of all members' labels. If most
  members disagree, it is the likely cause, and the members' sums stand still.
- A group of one can't tell the two apart and counts only against the member's worker.
- Under drift all workers disagree more often, so a worker is expected to disagree at least as often
  as the others did lately, at about the same confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FALSE_ALARMS = 1e-8
"""Bound on the share of a sound worker's answers at which it is named, if expected rates hold."""
CHANGED = 0.05
"""The share of changed labels that a worker is tested for: half of what should be found soon."""
CHANGED_BY_EXTRA = 0.5
"""The same for an extra task, all of whose answers come from one worker."""
LEAST = 0.002
"""The lowest rate that is expected of any answer: a single disagreement proves little."""
BINS = (0.005, 0.02, 0.1)
"""Expected rates between which the others' recent disagreements are counted together."""
MEMORIES = np.array([0.9, 0.99])[:, None, None]
"""What counts weigh after one more group: the short memory follows drift, the long one is exact."""
FEW = 10.0
"""Answers that a bin needs before its rate counts by more than half."""
CHANCE = 3.0
"""Standard deviations by which the others' disagreements may exceed what is expected by chance."""


class Member(NamedTuple):
    """What a complete group says of one member."""

    worker: int
    """The worker that answered for it directly."""
    expected: float
    """The calibrated probability that the extra task's answer disagrees."""
    agrees: bool


class ByzantineDetector:
    """The tests of all workers.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: int) -> None:
        self.sums = np.zeros((2, workers))
        """Of its own members' answers, and of its extra tasks."""
        self.limit = math.log(1 / FALSE_ALARMS)
        self._counts = np.zeros((2, workers, len(BINS) + 1))
        self._wrong = np.zeros_like(self._counts)
        self._expected = np.zeros_like(self._counts)
        """By memory, worker and bin."""

    def seen(self, members: Sequence[Member], extra: int) -> int | None:
        """Count a complete group; return the worker that is found to lie, if there is one.

        The sums begin again when one is found. A single worker can't stand out from others.
        """
        columns = np.array(members, float)
        workers, expected, wrong = columns[:, 0].astype(int), columns[:, 1], columns[:, 2] == 0
        bins = np.searchsorted(BINS, expected)
        overall = _surely(self._wrong.sum(1), self._expected.sum(1), self._counts.sum(1))
        others = _surely(
            *(a.sum(1)[:, None] - a for a in (self._wrong, self._expected, self._counts))
        )

        known = np.maximum(expected, overall.max(0)[bins])
        single = len(members) == 1
        if not single:
            ratio = _ratios(known, wrong, CHANGED_BY_EXTRA).sum()
            self.sums[1, extra] = max(0.0, self.sums[1, extra] + ratio)
        if single or 2 * wrong.sum() <= len(members):
            known = np.maximum(expected, others.max(0)[workers, bins])
            # A worker may have answered for several members.
            for worker, ratio in zip(workers, _ratios(known, wrong, CHANGED), strict=True):
                self.sums[0, worker] = max(0.0, self.sums[0, worker] + ratio)

        pairs = ((self._counts, 1), (self._wrong, wrong), (self._expected, expected))
        for sums, values in pairs:
            sums *= MEMORIES
            np.add.at(sums, (slice(None), workers, bins), values)  # type: ignore[arg-type]
        highest = self.sums.max(0)
        if len(highest) < 2:
            return None
        second, first = np.partition(highest, -2)[-2:]
        if first - second < self.limit:
            return None
        found = int(highest.argmax())
        self.sums[:] = 0.0
        return found


def _surely(wrong: np.ndarray, expected: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the rates of disagreement that chance does not explain."""
    rates: np.ndarray = (wrong - CHANCE * np.sqrt(expected + 1)) / (counts + FEW)
    return rates


def _ratios(expected: np.ndarray, wrong: np.ndarray, changed: float) -> np.ndarray:
    """Return the log-likelihood ratio of each member's agreement or disagreement."""
    sound = np.maximum(expected, LEAST)
    with_liar = sound + changed * (1 - sound)
    return np.where(wrong, np.log(with_liar / sound), math.log(1 - changed))
