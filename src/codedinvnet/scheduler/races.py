"""Whether copies pay: what they save and how they delay others, learned for each traffic.

A copy that answers first saves the time until its original would have answered. One that does not
saves nothing. Both take a server's time and delay others, by the square of that time: for a copy of
twice the length twice as many requests wait, twice as long. The busier the servers are, the more it
matters. Where requests take long by themselves, copies take as long, and harm more than they save;
there they stop, and one in `race_probe` shows whether that is still so. What is many times as late
is learned apart: a server may begin to stall where copies never won before.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from codedinvnet.scheduler.group import Traffic
from codedinvnet.scheduler.tuning import TUNING, Tuning


@dataclass(slots=True)
class _Race:
    copies: int
    saved: float = 1.0
    square: float = 1.0
    wanted: int = 0
    """Copies since the last that was sent."""


class Races:
    """What copies save and what they take, in service times."""

    def __init__(self, tuning: Tuning = TUNING) -> None:
        self._tuning = tuning
        self._races: defaultdict[tuple[Traffic, int], _Race] = defaultdict(
            partial(_Race, tuning.race_prior)  # which can be pickled
        )

    def allows(self, traffic: Traffic, level: int, busy: float, is_new: bool) -> bool:
        """Return whether a copy pays while so large a share of the servers is busy, or is a probe.

        Args:
            traffic: of the query.
            level: how late it is.
            busy: that share.
            is_new: whether no copy of the query was considered at this level before.
        """
        race, tuning = self._races[traffic, level], self._tuning
        race.wanted += is_new
        idle = max(tuning.least_idle, 1.0 - busy)
        pays = race.saved * idle >= tuning.worth * busy * race.square
        if not pays and race.wanted < tuning.race_probe:
            return False
        race.wanted = 0
        return True

    def ended(self, traffic: Traffic, level: int, taken: float) -> None:
        """Record what a copy took."""
        race = self._races[traffic, level]
        race.copies = min(self._tuning.race_memory, race.copies + 1)
        race.square += (min(self._tuning.longest_copy, taken) ** 2 - race.square) / race.copies
        race.saved -= race.saved / race.copies

    def won(self, traffic: Traffic, level: int, saved: float) -> None:
        """Record what a copy saved."""
        race = self._races[traffic, level]
        race.saved += min(self._tuning.most_saved, saved) / race.copies
