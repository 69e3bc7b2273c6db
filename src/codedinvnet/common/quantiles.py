"""Percentiles, and confidence intervals over repetitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

_BODY = (0.0, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 9)))
_TAIL = tuple(round(1 - 10 ** (-1 - i / 8), 6) for i in range(25))  # 0.9 to 0.9999
SHARES: tuple[float, ...] = (*_BODY, *_TAIL, 1.0)
"""The shares at which `quantiles` are taken: eight a decade in the tail."""


def rank_of(count: int, share: float) -> int:
    """Return the place, from 0, of a percentile among `count` values in ascending order.

    At least `share` of all values do not exceed the one in that place.
    """
    return max(0, math.ceil(share * count - 1e-9) - 1)  # 0.07 * 100 is a little more than 7


def percentile(values: Sequence[float] | np.ndarray, share: float) -> float:
    """Return the lowest of values (n,) that at least `share` of them do not exceed.

    Values may be infinite, in any order.
    """
    rank = rank_of(len(values), share)
    return float(np.partition(values, rank)[rank])


def rounded(value: float, digits: int) -> float | None:
    """Return a rounded value; None, for JSON, if it is not finite."""
    return round(float(value), digits) if math.isfinite(value) else None


def quantiles(values: Sequence[float] | np.ndarray, digits: int = 3) -> list[float]:
    """Return the interpolated quantiles of values (n,) at SHARES, rounded."""
    return [round(float(q), digits) for q in np.quantile(np.asarray(values), SHARES)]


def clustered_ci(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    weights: Mapping[Any, float] | None = None,
    centre: float | None = None,
    fewest: int = 3,
) -> float | None:
    """Return half of the 95 % interval (Student's t) of a mean of cluster means.

    The values of one cluster are independent repetitions. Clusters are settings chosen to be
    measured, not a sample of settings, so only what a cluster's repetitions differ by counts.

    Args:
        values: one for each repetition.
        clusters: the cluster of each value; None: one cluster.
        weights: the weight of each cluster's mean, such as {ours: 1, theirs: -1} for a difference;
            None: 1 / number of clusters.
        centre: the centre of the interval of a single cluster; None: its mean.
        fewest: repetitions that each cluster must have.

    Returns:
        None if a cluster has too few repetitions, or a value is not finite.
    """
    from scipy.stats import t as student

    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters or [None] * len(values), strict=True):
        groups.setdefault(cluster, []).append(value)
    known = all(map(math.isfinite, values)) and (centre is None or math.isfinite(centre))
    if not groups or not known or min(map(len, groups.values())) < max(2, fewest):
        return None
    parts = []
    for cluster, own in groups.items():
        weight = 1 / len(groups) if weights is None else weights[cluster]
        middle = statistics.fmean(own) if centre is None else centre
        variance = math.fsum((value - middle) ** 2 for value in own) / (len(own) - 1)
        parts.append((weight**2 * variance / len(own), len(own) - 1))
    total = math.fsum(part for part, _ in parts)
    if not total:
        return 0.0
    welch = total**2 / sum(part**2 / freedom for part, freedom in parts)
    return float(student.ppf(0.975, welch)) * math.sqrt(total)


def around(values: Sequence[float], centre: float) -> tuple[float, float] | None:
    """Return the 95 % interval around a latency, on the logarithm: a tail is off by a factor."""
    if centre <= 0 or any(value <= 0 for value in values):
        return None
    half = clustered_ci([math.log(value) for value in values], centre=math.log(centre))
    return None if half is None else (centre * math.exp(-half), centre * math.exp(half))
