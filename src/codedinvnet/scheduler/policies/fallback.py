"""What `auto` does with fallbacks: one of them gets a late query, and a copy follows."""

from __future__ import annotations

from dataclasses import dataclass

from codedinvnet.scheduler.policies.hedge import HEDGE
from codedinvnet.scheduler.policies.policy import Policy, Sender, Then
from codedinvnet.scheduler.queries import Attempt, Query


@dataclass(frozen=True)
class Fallback(Policy):
    """Asks a cheaper worker about a late query, or at once where no other is up."""

    title = "fallback"

    def taken(self, sender: Sender, query: Query) -> None:
        if not sender.slots_up:
            sender.fall_back(query)

    def queued(self, sender: Sender, attempt: Attempt) -> None:
        late = sender.stats.late(attempt.kind, None, attempt.traffic)
        if late is not None:
            sender.timers.set(sender.now + late, "waits", attempt.identity)

    def late(self, sender: Sender, attempt: Attempt, again: bool, runs: bool) -> Then:
        query = attempt.query
        waits = query is not None and query.fallback is not None and not again
        return Then.WATCH if sender.fall_back(query) or waits else Then.PASS

    def lost(self, sender: Sender, attempt: Attempt) -> None:
        sender.fall_back(attempt.query)


FALL_BACK = Fallback() | HEDGE
