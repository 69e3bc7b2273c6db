"""How long prompts take by what is new of them: a time that all take, and one for each byte.

Prompts are of all sizes, and long ones are few. A line through the times of all of them says what a
long one takes before many have come. Its slope is the median of the slopes between the classes of
size, each weighed by the bytes between them (Theil's and Sen's estimate): a class counts with its
median time, so that a slow worker, or a cache that wasn't there after all, bends it little.
"""

from __future__ import annotations

from collections import deque
from itertools import combinations

from codedinvnet.scheduler.tuning import Tuning


def bytes_of(size_class: int) -> int:
    """Return the bytes of a prompt in the middle of a size class."""
    return 3 * (1 << size_class) // 4


class Pace:
    """The time of a prompt's first token, as a function of the bytes that are not cached."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._times: dict[int, deque[float]] = {}
        """Of each size class."""
        self._last = deque[tuple[int, float]](maxlen=tuning.prompts_kept)
        self._base, self._rate = 0.0, tuning.first_rate
        self._since = 0

    def seconds(self, size: int) -> float:
        """Return what is normal for so many bytes."""
        return self._base + self._rate * size

    def took(self, size_class: int, seconds: float) -> None:
        """Learn from a prompt."""
        kept = self._tuning.prompts_kept
        times = self._times.setdefault(size_class, deque(maxlen=kept // 5))
        times.append(seconds)
        self._last.append((bytes_of(size_class), seconds))
        self._since += 1
        if len(self._last) < kept or self._since >= kept // 10:
            self._since = 0
            self._fit()

    def _fit(self) -> None:
        points = [(bytes_of(each), _at(0.5, times)) for each, times in self._times.items()]
        slopes = sorted(
            ((y - other) / (x - before), abs(x - before))
            for (before, other), (x, y) in combinations(points, 2)
        )
        half = sum(weight for _, weight in slopes) / 2
        if half >= self._tuning.least_spread:
            for slope, weight in slopes:
                half -= weight
                if half <= 0:
                    self._rate = max(0.0, slope)
                    break
        rest = [seconds - self._rate * size for size, seconds in self._last]
        self._base = max(self._tuning.least_base, _at(self._tuning.normal, rest))


def _at(share: float, values: deque[float] | list[float]) -> float:
    return sorted(values)[int(share * len(values))]
