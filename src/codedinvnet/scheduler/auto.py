"""What `auto` does about late answers, by what it measures.

1. With a code whose extra task is cheap, such as a small backup, a late query gets that task, for a
   k-th of a service time. If the task is late as well, it is sent once more, with a copy of the
   query; if no worker was free for it, a copy is sent after as long again.
2. With another code `auto` hedges. It codes every group as well while stragglers cost more than
   CODES (`LatencyStats.overhead`) and at most BUSY of the slots are busy. It stops when they cost
   less than half of CODES, or when more than BUSY and a tenth are busy.
3. Without a code it hedges.
4. It decides again after every LOOK queries.
"""

from __future__ import annotations

from codedinvnet.codes.rules import CodeRules
from codedinvnet.scheduler.actions import Decided, Seen
from codedinvnet.scheduler.policies import BACK_LATE, CODED, HEDGE, Policy
from codedinvnet.scheduler.stats import LatencyStats

LOOK = 50
"""Queries between two looks."""
GROUPS = 50
"""Groups that the fill is an average of."""
CHEAP = 0.5
"""An extra task is cheap if it costs less for one query, in service times."""
CODES = 0.02
"""Stragglers must cost so much, in normal times a task, for groups to be coded."""
BUSY = 0.5
"""No more of the slots may be busy when coding begins."""


class Decider:
    """Decides what is done.

    Args:
        code: the rules of the code at hand; None without one.

    Attributes:
        policy: what is done now.
    """

    def __init__(self, code: CodeRules | None) -> None:
        self._has_code = code is not None and code.r > 0
        self._backs_late = code is not None and has_cheap_task(code)
        self.policy = BACK_LATE if self._backs_late else HEDGE
        self._fill = 0.0
        self._since = 0

    def is_due(self, queries: int) -> bool:
        """Take in how many queries came; tell whether it is time to look again."""
        self._since += queries
        if self._since < LOOK:
            return False
        self._since = 0
        return True

    def sealed(self, fill: float) -> None:
        """Take in how full a group was when it was coded."""
        self._fill += (fill - self._fill) * (1.0 / GROUPS if self._fill else 1.0)

    def seen(self, stats: LatencyStats, load: float, extra: float) -> Seen:
        """Return what was measured."""
        return Seen(stats.normal, stats.overhead, load, self._fill, extra)

    def decide(self, now: float, seen: Seen) -> Decided:
        """Return what is to be done."""
        if self._backs_late:
            policy, reason = BACK_LATE, "late answers are made up by the small backup"
        elif not self._has_code:
            policy, reason = HEDGE, "there is no code"
        else:
            policy, reason = self._with_code(seen)
        self.policy = policy
        return Decided(now, policy.name, reason, seen)

    def _with_code(self, seen: Seen) -> tuple[Policy, str]:
        """Return what is done with a code whose extra tasks are dear, and why."""
        least, most = (CODES / 2, BUSY + 0.1) if self.policy.coded else (CODES, BUSY)
        if seen.excess <= least:
            return HEDGE, "stragglers cost little"
        if seen.load > most:
            return HEDGE, "stragglers cost much, and the workers are too busy for a code"
        return CODED | HEDGE, "stragglers cost much, and workers are idle"


def has_cheap_task(code: CodeRules) -> bool:
    """Tell whether a code has a cheap extra task for a single query."""
    if code.fixed_size or code.r < 1:
        return False
    task = code.tasks(1)[code.k]
    return task.cost < CHEAP and not task.encoded


def workers_for(policy: Policy, code: CodeRules) -> int:
    """Return the fewest workers: one a task of a group, unless the late alone get an extra one."""
    alone = policy.adapts and (has_cheap_task(code) or not code.r)
    return 1 if alone else max(policy.copies, len(code.tasks(code.k)))
