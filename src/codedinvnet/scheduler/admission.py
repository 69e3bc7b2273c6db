"""How many queries the service takes: as many as it can answer in time."""

from __future__ import annotations

import math

SHARE = 0.5
"""Share of a query's time that may pass with those before it. The rest is for what takes longer
than the last seconds' work did: dead workers, lost tasks."""
MEMORY, FEWEST = 2.0, 10
"""Seconds of full work over which the rate of answers is averaged, and seconds for which a refused
query counts; older ones fade. Much longer, and a burst would meet the rate of calmer times. Slow
answers fade only after so many have come: one or two say nothing about a rate."""
SHORTEST = 0.05
"""Seconds of full work that count at least: the first answers may come after a millisecond, and say
nothing about a rate."""
LONGEST_WAIT = 60
"""Seconds that a client is asked to wait, at most: by then workers that died are back."""


class Admission:
    """Decides whether queries can be answered in time, by the rate at which others were.

    The rate is measured only while more queries are unanswered than there are workers: otherwise it
    would be that of the clients' requests. While fewer are unanswered, new ones are always taken,
    since they wait for nobody. At first each worker counts as if it had answered one. Times are in
    seconds, of any clock.

    Args:
        workers: how many tasks they may be at together, at first.
        most: unanswered queries, at most, whatever the rate.
    """

    def __init__(self, workers: int, most: int) -> None:
        self.workers, self.most = workers, most
        self._time, self._answers = 0.0, float(workers)
        """Of full work, and what was answered in it, both faded."""
        self._refused = 0.0
        """Queries of the last seconds, faded."""
        self._at, self._full = 0.0, False

    def resize(self, workers: int) -> None:
        """Set how many tasks the workers that are up may be at together."""
        self.workers = max(1, workers)
        if not self._time:  # no rate is known yet
            self._answers = float(self.workers)

    def note(self, now: float, pending: int, answered: int = 0) -> None:
        """Record how many queries are unanswered from now on, and how many were just answered."""
        self._refused *= math.exp((self._at - now) / MEMORY)
        if self._full:
            memory = max(MEMORY, FEWEST / max(self.rate, 1e-9))
            kept = math.exp((self._at - now) / memory)
            self._time = self._time * kept + memory * (1 - kept)
            self._answers = self._answers * kept + answered
        self._at, self._full = now, pending > self.workers

    @property
    def rate(self) -> float:
        """Answers in a second of full work."""
        return self._answers / max(self._time, SHORTEST)

    def takes(self, pending: int, queries: int, seconds: float) -> bool:
        """Return whether more queries can be answered within so many seconds.

        Args:
            pending: how many are unanswered.
            queries: how many more.
            seconds: that they have.
        """
        if pending + queries > self.most:
            return False
        return pending <= self.workers or pending + queries <= self.rate * seconds * SHARE

    def refuse(self, pending: int, queries: int) -> int:
        """Count queries that are refused; return the whole seconds after which to try again.

        In that time all that are pending, and all that were refused lately, could be answered: the
        more clients are to come back, the later each does.
        """
        self._refused += queries
        seconds = (pending + self._refused) / max(self.rate, 1e-9)
        return math.ceil(min(max(1.0, seconds), LONGEST_WAIT))
