"""`hedge` copies late queries."""

from __future__ import annotations

from dataclasses import dataclass

from codedinvnet.scheduler.policies.policy import Launch, Policy, Sender, Then
from codedinvnet.scheduler.queries import Attempt, Query


@dataclass(frozen=True)
class Hedge(Policy):
    """Copies a query when all its attempts are late, and again when a copy is."""

    title = "hedge"

    def begun(self, sender: Sender, attempt: Attempt) -> None:
        if attempt.query is not None:
            sender.watch(attempt)

    def late(self, sender: Sender, attempt: Attempt, again: bool, runs: bool) -> Then:
        query = attempt.query
        if query is None:
            self._both(sender, attempt)
        elif runs and self._wants(sender, query) and not self._copy(sender, query):
            return Then.WATCH
        return Then.DONE

    def _both(self, sender: Sender, attempt: Attempt) -> None:
        """Send a late extra task once more, and copy the queries that it was sent for."""
        group, task, flying = attempt.group, attempt.number, sender.flying
        needed = group.needs(task)
        waiting = [flying.queries[each] for each in needed if each in flying.queries]
        if waiting and len(group.live[task]) < sender.tuning.most_backups:
            sender.launch(Launch(group, task, first=True, urgent=True))
        for query in waiting:
            if self._wants(sender, query):
                self._copy(sender, query)

    def withheld(self, sender: Sender, query: Query) -> None:
        if len(query.attempts) > 1 or not self._copy(sender, query):
            self.weakened(sender, query)

    def weakened(self, sender: Sender, query: Query) -> None:
        if not query.attempts or not self._wants(sender, query):
            return
        backed = query.takes_decoded and sender.flying.has_backup(query.group)
        if backed or query.fallback is not None or not self._copy(sender, query):
            sender.watch(next(iter(query.attempts.values())), sender.now)

    def _wants(self, sender: Sender, query: Query) -> bool:
        """Return whether all that is under way for a query is late, and a copy may be sent."""
        if not query.is_waiting or not query.repeatable:
            return False
        if query.copies >= sender.tuning.most_copies:
            return False
        return all(attempt.late for attempt in query.attempts.values())

    def _copy(self, sender: Sender, query: Query) -> bool:
        copy = Launch(query.group, query.member, query, first=True, urgent=True, hedge=True)
        return sender.launch(copy)


HEDGE = Hedge()
