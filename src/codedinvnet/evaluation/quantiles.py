"""Percentiles, histograms that add up, intervals over repetitions, and quantiles."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BODY = (0.0, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 9)))
_TAIL = tuple(round(1 - 10 ** (-1 - i / 8), 6) for i in range(25))  # 0.9 to 0.9999
SHARES: tuple[float, ...] = (*_BODY, *_TAIL, 1.0)
"""At which quantiles are taken: eight a decade in the tail."""
GROWTH = 1.01
"""A bucket of a histogram ends at so many times the end of the one below."""
FEWEST = 3
"""With fewer repetitions there is no interval."""


def rank_of(count: int, share: float) -> int:
    """Return the place, from 0, of a percentile among `count` values in ascending order.

    So few values are left behind it that at least `share` of all do not exceed it.
    """
    return max(0, math.ceil(share * count - 1e-9) - 1)  # 0.07 * 100 is a little more than 7


def percentile(values: Sequence[float] | np.ndarray, share: float) -> float:
    """Return the lowest of values (n,) that at least `share` of them do not exceed.

    Values may be infinite, and stand in any order.
    """
    rank = rank_of(len(values), share)
    return float(np.partition(values, rank)[rank])


def rounded(value: float, digits: int) -> float | None:
    """Return a rounded value, or None, as JSON has no other, for one that is not finite."""
    return round(float(value), digits) if math.isfinite(value) else None


def quantiles(values: Sequence[float] | np.ndarray, digits: int = 3) -> list[float]:
    """Return the quantiles of values (n,) at SHARES, interpolated and rounded.

    Raises:
        ValueError: if there are no values.
    """
    if len(values) == 0:
        raise ValueError("no values, no quantiles")
    return [round(float(q), digits) for q in np.quantile(np.asarray(values), SHARES)]


def half_width(values: Sequence[float], centre: float | None = None) -> float | None:
    """Return half of the 95 % interval (Student's t) that independent repetitions give.

    Every ± of a frame is one. None if there are fewer than three, or one is not finite.

    Args:
        values: one of each repetition.
        centre: what the interval is around; None: their mean.
    """
    from scipy.stats import t as student

    n = len(values)
    centre = math.fsum(values) / n if centre is None and n else centre
    if n < FEWEST or centre is None or not all(map(math.isfinite, (*values, centre))):
        return None
    scatter = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1) / n)
    return float(student.ppf(0.975, n - 1)) * scatter


def half_width_within(groups: Sequence[Sequence[float]]) -> float | None:
    """Return half of the 95 % interval around the mean of groups' means.

    Only what repetitions of a group differ by counts: groups are what was chosen to be measured,
    and no sample of others. None if a group has no two repetitions, or a value is not finite.

    Args:
        groups: the values of each group's repetitions.
    """
    from scipy.stats import t as student

    freedom = sum(len(group) - 1 for group in groups)
    if any(len(group) < 2 for group in groups) or not freedom:
        return None
    if not all(math.isfinite(value) for group in groups for value in group):
        return None
    variance = math.fsum(statistics.variance(group) / len(group) for group in groups)
    return float(student.ppf(0.975, freedom)) * math.sqrt(variance) / len(groups)


def around(values: Sequence[float], centre: float) -> tuple[float, float] | None:
    """Return the 95 % interval around a latency from those of repetitions, all above 0.

    It is taken on the logarithm: a tail is off by a factor. None as for `half_width`.
    """
    if centre <= 0 or any(value <= 0 for value in values):
        return None
    half = half_width([math.log(value) for value in values], math.log(centre))
    return None if half is None else (centre * math.exp(-half), centre * math.exp(half))


@dataclass(frozen=True)
class Histogram:
    """Latencies in ms, counted in buckets of 1 %; those of several runs add up.

    Attributes:
        counts: number of a bucket -> how many are in it.
        lost: how many requests were never answered; they are infinitely late.
    """

    counts: Mapping[int, int] = field(default_factory=dict)
    lost: int = 0

    @classmethod
    def of(cls, latencies: Sequence[float] | np.ndarray) -> Histogram:
        """Count latencies (n,) in ms, which may be infinite."""
        values = np.asarray(latencies, float)
        finite = values[np.isfinite(values)]
        numbers = np.ceil(np.log(np.maximum(finite, 1e-3)) / math.log(GROWTH)).astype(int)
        found, counts = np.unique(numbers, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        return cls(dict(pairs), len(values) - len(finite))

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Histogram:
        """Read the histogram of a row of `bench latency`."""
        found = row["histogram"]
        return cls({int(number): count for number, count in found["counts"]}, found["lost"])

    def as_json(self) -> dict[str, Any]:
        """Return what `of_row` reads of a row."""
        return {"counts": [[n, self.counts[n]] for n in sorted(self.counts)], "lost": self.lost}

    def __add__(self, other: Histogram) -> Histogram:
        both = Counter(self.counts)
        both.update(other.counts)
        return Histogram(dict(both), self.lost + other.lost)

    @property
    def total(self) -> int:
        """How many requests there were, answered or not."""
        return sum(self.counts.values()) + self.lost

    def percentile(self, share: float) -> float:
        """Return the percentile in ms, to half a percent; infinite if as many were lost."""
        latency, later = self.curve()
        place = self.total - 1 - rank_of(self.total, share)
        reached = np.flatnonzero(later <= place)
        return float(latency[reached[0]]) if len(reached) else math.inf

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return latencies (n,) in ms, and how many requests (n,) took longer than each."""
        numbers = sorted(self.counts)
        latency = GROWTH ** (np.array(numbers) - 0.5)
        later = self.total - np.cumsum([self.counts[n] for n in numbers])
        return latency, later.astype(int)
