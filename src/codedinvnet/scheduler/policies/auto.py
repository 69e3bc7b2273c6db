"""What `auto` does about late answers, by what it measures.

1. With a code whose extra task is cheap, such as a small backup, a late query gets that task, for a
   k-th of a service time. If the task is late as well, it is sent once more, with a copy of the
   query; if no worker was free for it, a copy is sent after as long again.
2. With another code `auto` hedges. It codes every group as well while stragglers cost more than
   `codes_from` (`LatencyStats.overhead`) and at most `codes_busy` of the slots are busy. It stops
   when they cost less than half of that, or when a tenth more are busy.
3. Without a code it hedges. Where there are fallbacks, a late query goes to one of these first,
   and is copied after as long again.
4. It decides again after every `auto_looks` queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from codedinvnet.codes.rules import CodeRules
from codedinvnet.scheduler.actions import Decided, Seen
from codedinvnet.scheduler.policies.backup import BACK_LATE
from codedinvnet.scheduler.policies.coded import CODED
from codedinvnet.scheduler.policies.fallback import FALL_BACK
from codedinvnet.scheduler.policies.hedge import HEDGE
from codedinvnet.scheduler.policies.policy import Policy
from codedinvnet.scheduler.stats import LatencyStats
from codedinvnet.scheduler.tuning import TUNING, Tuning


@dataclass(frozen=True)
class Auto(Policy):
    """Goes by what a `Decider` decides from measurements."""

    title = "auto"
    hedged = True
    adapts = True

    def fewest_workers(self, code: CodeRules) -> int:
        """Return 1 unless every group may be coded: the late alone get an extra task, or a copy."""
        if not code.r or has_cheap_task(code):
            return 1
        return super().fewest_workers(code)


AUTO = Auto()


class Decider:
    """Decides what is done.

    Args:
        code: the rules of the code at hand; None without one.
        tuning: the scheduler's numbers.
        falls_back: whether there are fallbacks.

    Attributes:
        policy: what is done now.
    """

    def __init__(
        self, code: CodeRules | None, tuning: Tuning = TUNING, falls_back: bool = False
    ) -> None:
        self._tuning = tuning
        self._has_code = code is not None and code.r > 0
        self._backs_late = code is not None and has_cheap_task(code, tuning)
        self._without_code = FALL_BACK if falls_back else HEDGE
        self.policy = BACK_LATE if self._backs_late else self._without_code
        self._fill = 0.0
        self._since = 0

    def is_due(self, queries: int) -> bool:
        """Count the queries that came; return whether it is time to decide again."""
        self._since += queries
        if self._since < self._tuning.auto_looks:
            return False
        self._since = 0
        return True

    def sealed(self, fill: float) -> None:
        """Record how full a group was when it was coded."""
        self._fill += (fill - self._fill) * (1.0 / self._tuning.fill_memory if self._fill else 1.0)

    def seen(self, stats: LatencyStats, load: float, extra: float) -> Seen:
        """Return what was measured."""
        return Seen(stats.normal, stats.overhead, load, self._fill, extra)

    def decide(self, now: float, seen: Seen) -> Decided:
        """Return what is to be done."""
        if self._backs_late:
            policy, reason = BACK_LATE, "late answers are made up by the small backup"
        elif not self._has_code:
            policy, reason = self._without_code, "there is no code"
        else:
            policy, reason = self._with_code(seen)
        self.policy = policy
        return Decided(now, policy.name, reason, seen)

    def _with_code(self, seen: Seen) -> tuple[Policy, str]:
        """Return what is done with a code whose extra tasks are dear, and why."""
        least, most = self._tuning.codes_from, self._tuning.codes_busy
        if self.policy.coded:
            least, most = least / 2, most + 0.1
        if seen.excess <= least:
            return HEDGE, "stragglers cost little"
        if seen.load > most:
            return HEDGE, "stragglers cost much, and the workers are too busy for a code"
        return CODED | HEDGE, "stragglers cost much, and workers are idle"


def has_cheap_task(code: CodeRules, tuning: Tuning = TUNING) -> bool:
    """Return whether a code has a cheap extra task for a single query."""
    if code.fixed_size or code.r < 1:
        return False
    task = code.tasks(1)[code.k]
    return task.cost < tuning.cheap and not task.encoded
