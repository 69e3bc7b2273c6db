"""Whether copies pay: what they save and how they delay others, learned for each traffic.

A copy that answers first saves the time until its original would have answered. One that does not
saves nothing. Both take a server's time and delay others, by the square of that time: for a copy of
twice the length twice as many requests wait, twice as long. The busier the servers are, the more it
matters. Where requests take long by themselves, copies take as long, and harm more than they save;
there they stop, and one in PROBE shows whether that is still so. What is many times as late is
learned apart: a server may begin to stall where copies never won before.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from codedinvnet.scheduler.group import Traffic

WORTH = 0.2
"""A copy must save this share of the square of what it takes, times the busy share of the servers
by the idle one. At a single server others wait half of that (Pollaczek, 1930)."""
LEAST_IDLE = 0.03
"""The idle share counts as this at least: a stall of many service times is worth a copy of one even
while all servers are busy."""
MEMORY = 20
"""How many copies the savings and the squares are averages of."""
PROBE = 200
"""Where copies do not pay, one of so many is sent."""
LONGEST = 10.0
"""No copy takes more, in service times: what is longer has stalled, and its server may work on."""
MOST = 100.0
"""No copy saves more, in service times: what is longer is a hang."""


@dataclass(slots=True)
class _Race:
    saved: float = 1.0
    square: float = 1.0
    copies: int = 1
    wanted: int = 0
    """Copies since the last that was sent."""


class Races:
    """What copies save and what they take, in service times."""

    def __init__(self) -> None:
        self._races: defaultdict[tuple[Traffic, int], _Race] = defaultdict(_Race)

    def allows(self, traffic: Traffic, level: int, busy: float, is_new: bool) -> bool:
        """Tell whether a copy pays while so large a share of the servers is busy, or is a probe.

        Args:
            traffic: of the query.
            level: how late it is.
            busy: that share.
            is_new: whether no copy of the query was considered at this level before.
        """
        race = self._races[traffic, level]
        race.wanted += is_new
        pays = race.saved * max(LEAST_IDLE, 1.0 - busy) >= WORTH * busy * race.square
        if not pays and race.wanted < PROBE:
            return False
        race.wanted = 0
        return True

    def ended(self, traffic: Traffic, level: int, taken: float) -> None:
        """Take in what a copy has taken."""
        race = self._races[traffic, level]
        race.copies = min(MEMORY, race.copies + 1)
        race.square += (min(LONGEST, taken) ** 2 - race.square) / race.copies
        race.saved -= race.saved / race.copies

    def won(self, traffic: Traffic, level: int, saved: float) -> None:
        """Take in what a copy saved."""
        race = self._races[traffic, level]
        race.saved += min(MOST, saved) / race.copies
