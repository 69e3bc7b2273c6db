"""When a copy of a query is sent, what copies may cost, and when extra tasks yield.

1. A data task is late if it began longer ago than tasks of its kind normally take, though its
   answer may be on the way (`Pace.late`). If every attempt of its query is late, a copy is sent. It
   waits first in the line.
2. A copy may be late as well: a query has COPIES of them at most.
3. Every query adds `hedge_share` of a copy to the budget, which holds BUCKET at most; a copy takes
   one out. A late query for which there is none is looked at again, as long after.
4. A parity, a small backup's task, and what is sent twice from the start are *extra*: others may
   answer in their place. An extra task whose turn has come is dropped if many needed tasks wait
   behind it. How many depends on what stragglers cost (`Pace.excess`): WORTH times that for every
   slot, and MOST at most. Where nobody straggles, extra tasks are computed only while none waits.
"""

from __future__ import annotations

from codedinvnet.serving.rules.tasks import Query, State

COPIES = 2
"""The most copies of one query."""
BUCKET = 10.0
"""The most copies that may be saved up."""
WORTH, MOST = 80.0, 4.0
"""How many needed tasks may wait for each slot behind an extra one, and at most."""


class Budget:
    """What copies may cost.

    Args:
        share: copies for each query.

    Attributes:
        tokens: copies that may be sent now.
        spent: copies that were sent.
        earned: queries that came.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.tokens = 0.0
        self.spent = 0
        self.earned = 0

    def earn(self) -> None:
        """A query has come."""
        self.earned += 1
        self.tokens = min(BUCKET, self.tokens + self.share)

    def pay(self) -> bool:
        """Take a copy out; return whether there was one."""
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        self.spent += 1
        return True


def wants_copy(query: Query) -> bool:
    """Tell whether nothing of a query is under way that is not late, and a copy may be."""
    waits = query.state is State.WAITING and query.copies < COPIES
    return waits and all(attempt.late for attempt in query.attempts.values())


def yields(waiting: int, slots: int, excess: float) -> bool:
    """Tell whether an extra task would lengthen a line of so many needed ones too much."""
    return waiting > min(MOST, WORTH * excess) * slots
