"""`replicate` sends every query twice."""

from __future__ import annotations

from dataclasses import dataclass

from codedinvnet.codes.rules import CodeRules
from codedinvnet.scheduler.policies.policy import Launch, Policy, Sender
from codedinvnet.scheduler.queries import Query


@dataclass(frozen=True)
class Replicate(Policy):
    """Sends several copies of each query at once."""

    times: int = 2
    title = "replicate"

    def fewest_workers(self, code: CodeRules) -> int:
        return max(self.times, super().fewest_workers(code))

    def taken(self, sender: Sender, query: Query) -> None:
        for _ in range(1, self.times):
            sender.launch(Launch(query.group, query.member, query))


REPLICATE = Replicate()
