"""Simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Calls what is due, in order of time; what is due at the same time, in the order of asking.

    Attributes:
        now: the time in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call something in so many seconds; at once if they are negative."""
        self._asked += 1
        at = self.now + max(0.0, seconds)
        heapq.heappush(self._due, (at, self._asked, call, arguments))

    def step(self) -> None:
        """Go on to the time at which something is due, and call it."""
        self.now, _, call, arguments = heapq.heappop(self._due)
        call(*arguments)
