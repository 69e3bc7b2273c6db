"""The clock of the front end: it calls when the rules want to be called.

An event loop that stood still finds answers in its sockets, and hands them on from turn to turn.
Until they have arrived, busy workers look like hung ones. So what is overdue waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import Histogram

LAG_PERIOD = 0.5
"""Seconds between two looks at the event loop, and at the timer."""
STALLED = 0.5
"""A timer that is later than so many seconds tells of an event loop that stood still."""
CATCH_UP = 0.02
"""Seconds without an answer, after which all that came meanwhile has been taken in."""
TURNS = 20
"""The event loop takes at least so many turns in these seconds."""
LONGEST = 1.0
"""Seconds after which nothing waits any longer, though answers still come."""


async def watch(lag: Histogram, look: Callable[[], None]) -> None:
    """Measure how late the event loop is, and look at the timer again, for ever."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(LAG_PERIOD)
        lag.observe(max(0.0, time.monotonic() - began - LAG_PERIOD))
        look()


class CatchUp:
    """Puts off what is overdue until the answers that came before have been taken in.

    Turns are counted as well as seconds: one turn may read answers for longer than `CATCH_UP`, and
    they are handed on in the turns that follow.
    """

    def __init__(self) -> None:
        self._overdue: list[Callable[[], None]] = []
        self._since, self._turns, self._quiet = 0.0, 0, 0

    def heard(self, began: float) -> None:
        """Record an answer to what began at that time; what began since counts for nothing.

        A busy service always has such answers, and nothing would ever be called late.
        """
        if began < self._since:
            self._quiet = 0

    def put_off(self, call: Callable[[], None]) -> None:
        """Call it once no more answers come."""
        self._overdue.append(call)
        if len(self._overdue) == 1:
            self._since, self._turns, self._quiet = time.monotonic(), 0, 0
            self._wait()

    def _wait(self) -> None:
        asyncio.get_running_loop().call_later(CATCH_UP / TURNS, self._turn)

    def _turn(self) -> None:
        self._turns, self._quiet = self._turns + 1, self._quiet + 1
        long = self._turns > TURNS and time.monotonic() - self._since > LONGEST
        if self._quiet < TURNS and not long:
            self._wait()
            return
        overdue, self._overdue = self._overdue, []
        for call in overdue:
            call()


class Alarm:
    """One timer, set to the earliest of the times that it was given.

    Args:
        call: called with the time when the timer is due.

    Attributes:
        heard: must be called for every answer; see `CatchUp.heard`.
    """

    def __init__(self, call: Callable[[float], None]) -> None:
        self.call = call
        self._timer: asyncio.TimerHandle | None = None
        self._at: float | None = None
        self._catch_up = CatchUp()
        self.heard = self._catch_up.heard

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
        if self._at is not None and time.monotonic() - self._at > STALLED:
            self._catch_up.put_off(self._call)
        else:
            self._call()

    def _call(self) -> None:
        if self._at is not None:  # else it was cancelled meanwhile
            self.cancel()
            self.call(time.monotonic())
