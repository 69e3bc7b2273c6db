"""Percentiles, and quantiles that carry a distribution, the tail as closely as the body."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_BODY = (0.0, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 9)))
_TAIL = tuple(round(1 - 10 ** (-1 - i / 8), 6) for i in range(25))  # 0.9 to 0.9999
SHARES: tuple[float, ...] = (*_BODY, *_TAIL, 1.0)
"""At which quantiles are taken: eight a decade in the tail."""


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
