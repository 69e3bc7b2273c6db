"""The clock of the front end: it calls when the rules want to be called."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

STALLED = 0.5
"""A timer that is later than so many seconds tells of an event loop that stood still."""
CATCH_UP = 0.01
"""Seconds in which it takes in what has come meanwhile, before anyone is called late."""


class Alarm:
    """One timer, set to the earliest of the times that it was given.

    Args:
        call: called with the time when the timer is due.
    """

    def __init__(self, call: Callable[[float], None]) -> None:
        self.call = call
        self._timer: asyncio.TimerHandle | None = None
        self._at: float | None = None
        self._catching_up = False

    def set(self, at: float | None) -> None:
        """Be called at a time, unless that happens sooner already; None: no more than now."""
        if at is None or (self._at is not None and self._at <= at):
            return
        self.cancel()
        delay = max(0.0, at - time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay, self._ring)
        self._at = at

    def cancel(self) -> None:
        """Forget the time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._at = None

    def _ring(self) -> None:
        now, due = time.monotonic(), self._at
        if due is not None and now - due > STALLED and not self._catching_up:
            # Answers may lie in the sockets: without them, busy workers would be taken for hung.
            self._catching_up = True
            self._timer = asyncio.get_running_loop().call_later(CATCH_UP, self._ring)
            return
        self._catching_up = False
        self._timer = self._at = None
        self.call(now)
