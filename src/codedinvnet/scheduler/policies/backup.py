"""What `auto` does with a small backup: late queries get its task, and then a copy."""

from __future__ import annotations

from dataclasses import dataclass

from codedinvnet.scheduler.policies.hedge import HEDGE
from codedinvnet.scheduler.policies.policy import Launch, Policy, Sender, Then
from codedinvnet.scheduler.queries import Attempt


@dataclass(frozen=True)
class Backup(Policy):
    """Asks a code's cheap extra task, such as a small backup, about late queries."""

    title = "backup"
    backs_late = True

    def begun(self, sender: Sender, attempt: Attempt) -> None:
        if attempt.query is None:
            sender.watch(attempt)

    def late(self, sender: Sender, attempt: Attempt, again: bool, runs: bool) -> Then:
        if attempt.query is None:
            return Then.PASS
        if self._send(sender, attempt) or (not again and sender.flying.has_backup(attempt.group)):
            return Then.WATCH
        return Then.PASS

    def lost(self, sender: Sender, attempt: Attempt) -> None:
        self._send(sender, attempt)

    def _send(self, sender: Sender, attempt: Attempt) -> bool:
        """Send a query's group its extra task, once; return whether it was sent."""
        query, group = attempt.query, attempt.group
        k = group.code.k
        if query is None or not query.wants_decoded:
            return False
        if group.is_open or not group.code.r or k in group.outputs:
            return False
        if group.live.get(k) or group.retries:
            return False
        return sender.launch(Launch(group, k, first=True, urgent=True))


BACK_LATE = Backup() | HEDGE
