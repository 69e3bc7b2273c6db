"""Quantiles that carry a distribution in a few numbers, the tail as closely as the body."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BODY = (0.0, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 9)))
_TAIL = tuple(round(1 - 10 ** (-1 - i / 8), 6) for i in range(25))  # 0.9 to 0.9999
SHARES: tuple[float, ...] = (*_BODY, *_TAIL, 1.0)
"""At which quantiles are taken: eight a decade in the tail."""


def quantiles(values: Sequence[float] | np.ndarray, digits: int = 3) -> list[float]:
    """Return the quantiles of values (n,) at SHARES, rounded.

    Raises:
        ValueError: if there are no values.
    """
    if len(values) == 0:
        raise ValueError("no values, no quantiles")
    return [round(float(q), digits) for q in np.quantile(np.asarray(values), SHARES)]
