"""When a copy of a query is sent, what extra work may cost, and when extra tasks yield.

1. A data task is late if it began longer ago than tasks of its kind normally take, though its
   answer may be on the way (`Pace.late`). If every attempt of its query is late, a copy is sent. It
   waits first in the line.
2. A copy may be late as well: a query has COPIES of them at most. One that is lost is followed by
   another at once, or as soon as that can be paid.
3. A parity, a small backup's task, and what is sent twice from the start are *extra*: others may
   answer in their place. An extra task whose turn has come is dropped if many needed tasks wait
   behind it. How many depends on what stragglers cost (`Pace.excess`), and on the share of the
   slots that is idle (`Binding.load`): WORTH times both for every slot, and MOST at most. Where
   nobody straggles, extra tasks are computed only while none waits.
4. Extra work is paid from one budget, in service times of the served model. Every query adds
   `Rules.extra` to it, and it holds BUCKET at most. A copy costs one, or its share of it if queries
   differ in bulk (`Pace.price`). Another extra task costs what such tasks take (`Pace.cost`), or
   what its code says before that is known. A rescue costs no more than a copy: when all workers
   stall, only rescues that take long are measured, and none would ever be paid again. What costs
   more than BUCKET is sent when that is full, and paid off before anything else is. What is
   dropped before a worker has it is paid back.
5. What the budget cannot pay is not sent. A late query without a copy is looked at again, as long
   after. Copies, and what is sent to a late query, come first: other extra tasks leave RESERVE.
6. While stragglers cost more than RESCUES_EARLY, a query gets its rescue (`auto`) before it is
   late: so early that the answer is here when it is. That is extra, and only sent while IDLE
   times the root of the number of slots are idle: as many as would seldom all be taken at once.
7. Without `Rules.extra` a fixed policy pays for copies alone, from `hedge_share` a query.
   Nobody pays for tasks of a backup's own workers: they take nothing from the others.
"""

from __future__ import annotations

import math

from codedinvnet.scheduler.tasks import Query, State

COPIES = 2
"""The most copies of one query."""
RESCUES = 2
"""The most extra tasks of one late query at a time."""
BUCKET = 10.0
"""The most extra work that may be saved up, in service times."""
RESCUES_EARLY = 0.005
"""Stragglers must cost more (`Pace.excess`) for queries to be rescued before they are late."""
IDLE = 2.0
"""So many roots of their number of slots must be idle for that."""
MEMORY = 500
"""How many queries the extra work that is told is an average of."""
RESERVE = 1.0
"""What extra tasks leave in the budget that nobody is late for yet."""
WORTH, MOST = 130.0, 4.0
"""How many needed tasks may wait for each slot behind an extra one, and at most."""


class Budget:
    """What extra work may cost, in service times of the served model.

    Attributes:
        share: for each query.
        tokens: what may be spent now; below 0 if something that cost more than BUCKET was sent.
        spent: what was spent in all.
        queries: those that came.
        recent: what was spent for each query, of about MEMORY of them.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self.tokens = 0.0
        self.spent = 0.0
        self.queries = 0
        self.recent = 0.0
        self._counted = 0.0
        """What of `spent` is in `recent`."""

    def earn(self) -> None:
        """A query has come."""
        self.queries += 1
        self.recent += (self.spent - self._counted - self.recent) / min(self.queries, MEMORY)
        self._counted = self.spent
        self.tokens = min(BUCKET, self.tokens + self.share)

    def pay(self, work: float, left: float = 0.0) -> bool:
        """Spend so much if so much is left then, or all is there; return whether it was."""
        if self.tokens < min(work + left, BUCKET):
            return False
        self.tokens -= work
        self.spent += work
        return True

    def refund(self, work: float) -> None:
        """Take back what was not done."""
        self.tokens = min(BUCKET, self.tokens + work)
        self.spent -= work


def wants_copy(query: Query) -> bool:
    """Tell whether nothing of a query is under way that is not late, and a copy may be."""
    waits = query.state is State.WAITING and query.copies < COPIES
    return waits and all(attempt.late for attempt in query.attempts.values())


def has_idle(running: int, slots: int) -> bool:
    """Tell whether so many slots are idle that hardly anybody would find none."""
    return slots - running >= IDLE * math.sqrt(slots)


def yields(waiting: int, slots: int, excess: float, load: float) -> bool:
    """Tell whether an extra task would lengthen a line of so many needed ones too much."""
    return waiting > min(MOST, WORTH * excess * (1.0 - load)) * slots
