"""Quantiles of the last values that came."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

KEPT = 1000
"""Values that are kept."""
FEWEST = 20
"""Nothing is known before so many values are here."""
REFRESH = 50
"""The quantiles are computed again after so many values."""


class RecentQuantiles:
    """Quantiles of the last values.

    Args:
        shares: the values that do not exceed a quantile, ascending or not.

    Attributes:
        quantiles: one for each share; empty before FEWEST values have come.
    """

    def __init__(self, *shares: float) -> None:
        self.values: deque[float] = deque()
        """The values in the order of coming."""
        self.quantiles: tuple[float, ...] = ()
        self._ordered: list[float] = []
        self._shares = shares
        self._fresh = 0

    def add(self, value: float) -> None:
        """Take a value in."""
        self.values.append(value)
        insort(self._ordered, value)
        if len(self.values) > KEPT:
            del self._ordered[bisect_left(self._ordered, self.values.popleft())]
        self._fresh += 1
        if self._fresh < REFRESH and (self.quantiles or self._fresh < FEWEST):
            return
        self._fresh = 0
        count = len(self._ordered)
        self.quantiles = tuple(self._ordered[int(share * count)] for share in self._shares)
