"""Quantiles of the last values that came."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from codedinvnet.scheduler.tuning import TUNING, Tuning


class RecentQuantiles:
    """Quantiles of the last values.

    Args:
        shares: the values that do not exceed a quantile, ascending or not.

    Attributes:
        quantiles: one for each share; empty before `times_needed` values have come.
    """

    def __init__(self, *shares: float, tuning: Tuning = TUNING) -> None:
        self.values: deque[float] = deque()
        """The values in the order of coming."""
        self.quantiles: tuple[float, ...] = ()
        self._ordered: list[float] = []
        self._shares, self._tuning = shares, tuning
        self._fresh = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self.values.append(value)
        insort(self._ordered, value)
        if len(self.values) > self._tuning.times_kept:
            del self._ordered[bisect_left(self._ordered, self.values.popleft())]
        self._fresh += 1
        tuning = self._tuning
        if self._fresh < (tuning.times_refreshed if self.quantiles else tuning.times_needed):
            return
        self._fresh = 0
        count = len(self._ordered)
        self.quantiles = tuple(self._ordered[int(share * count)] for share in self._shares)
