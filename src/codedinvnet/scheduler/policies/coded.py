"""`coded` sends a code's extra tasks with every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codedinvnet.scheduler.group import CodingGroup
from codedinvnet.scheduler.policies.policy import Launch, Policy, Sender


@dataclass(frozen=True)
class Coded(Policy):
    """Sends a code's extra tasks before anybody is late."""

    title = "coded"
    coded = True

    def sealed(self, sender: Sender, group: CodingGroup, extra: Sequence[int]) -> None:
        for task in extra:
            sender.launch(Launch(group, task))


CODED = Coded()
