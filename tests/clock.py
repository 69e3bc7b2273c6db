"""A clock that tests put forward: limits of minutes are tested in a moment."""

from __future__ import annotations

import time


class Clock:
    """Stands in for `time.monotonic`, by which asyncio's own event loop waits as well.

    uvloop has a clock of its own: tests that put this one forward run without it.
    """

    def __init__(self) -> None:
        self._real, self._ahead = time.monotonic, 0.0

    def __call__(self) -> float:
        return self._real() + self._ahead

    def forward(self, seconds: float) -> None:
        self._ahead += seconds
