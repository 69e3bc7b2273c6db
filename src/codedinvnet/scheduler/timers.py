"""Timers in the order in which they are due."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "deadline",
    "group",
    "hang",
    "late",
    "ramp",
    "recheck",
    "resend",
    "retry",
    "unknown",
    "waits",
]
"""What is due: `Scheduler.on_timer` does it, `Dispatcher.is_dead` says when it is needless."""
FEW = 256
"""The heap is rebuilt only when it holds this many dead entries."""


class Timers:
    """A heap of timers; those that have nothing left to do are dead.

    Args:
        dead: returns whether a timer (kind, identity) has nothing to do, whatever happens until it
            is due.
    """

    def __init__(self, dead: Callable[[Kind, int], bool]) -> None:
        self._dead = dead
        self._heap: list[tuple[float, int, Kind, int]] = []
        self._kept = self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, when: float, kind: Kind, identity: int) -> None:
        """Set a timer."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, kind, identity))

    def next(self) -> float | None:
        """Return when the first one is due that is not dead."""
        if len(self._heap) > 2 * self._kept + FEW:
            # Behind a live one dead ones would stay until they are due, which a deadline may make
            # hours.
            self._heap = [timer for timer in self._heap if not self._dead(*timer[2:])]
            heapq.heapify(self._heap)
            self._kept = len(self._heap)
        while self._heap and self._dead(*self._heap[0][2:]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> tuple[Kind, int] | None:
        """Take the first one out if it is due."""
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, kind, identity = heapq.heappop(self._heap)
        return kind, identity
