"""What a policy is: a value whose methods turn events into launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

from codedinvnet.codes.rules import CodeRules
from codedinvnet.scheduler.group import CodingGroup
from codedinvnet.scheduler.queries import Attempt, InFlight, Query
from codedinvnet.scheduler.stats import LatencyStats
from codedinvnet.scheduler.timers import Timers
from codedinvnet.scheduler.tuning import Tuning


class Launch(NamedTuple):
    """A task that a policy wants to send in addition to the queries' own."""

    group: CodingGroup
    task: int
    query: Query | None = None
    """The query that is copied; None: the task is the code's."""
    first: bool = False
    """See `Attempt`."""
    urgent: bool = False
    """Somebody is late: it needs no reserve in the budget and does not yield."""
    hedge: bool = False
    """It is a copy of a late query, which is always paid for."""


class Then(Enum):
    """What follows when a part of a policy has seen a late task."""

    PASS = "pass"
    """The next part sees it."""
    DONE = "done"
    WATCH = "watch"
    """The policy sees it again after as long again."""


class Sender(Protocol):
    """What policies see of the dispatcher."""

    tuning: Tuning
    flying: InFlight
    stats: LatencyStats
    timers: Timers
    now: float
    """The time of the event."""

    @property
    def slots_up(self) -> int:
        """How many tasks the workers that are up may be at together."""

    def launch(self, launch: Launch) -> bool:
        """Send a task if the budget allows; return whether it does."""

    def fall_back(self, query: Query | None) -> bool:
        """Ask a cheaper worker about a query, once; return whether it is asked now."""

    def watch(self, attempt: Attempt, since: float | None = None) -> None:
        """Let the policy see a task when it is late, counted from now, or from `since`."""


@dataclass(frozen=True)
class Policy:
    """What the scheduler does about late and missing answers."""

    title: ClassVar[str]

    @cached_property
    def coded(self) -> bool:
        """Whether it sends a code's extra tasks with every group."""
        return False

    @cached_property
    def hedged(self) -> bool:
        """Whether it does something about a late task."""
        return type(self).late is not Policy.late

    @cached_property
    def backs_late(self) -> bool:
        """Whether it sends a code's extra task when a query is late."""
        return False

    @cached_property
    def adapts(self) -> bool:
        """Whether it changes while it runs, by what is measured."""
        return False

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies that it is composed of."""
        return (self,)

    def __or__(self, other: Policy) -> Policy:
        return Joined(self.parts + other.parts)

    @cached_property
    def name(self) -> str:
        """Its name on the command line."""
        return "+".join(part.title for part in self.parts)

    @property
    def takes_code(self) -> bool:
        """Whether a code is of any use to it."""
        return self.coded or self.adapts

    def fewest_workers(self, code: CodeRules) -> int:
        """Return how many workers it needs: the tasks of a group go to distinct ones."""
        return len(code.tasks(code.k))

    # Events

    def taken(self, sender: Sender, query: Query) -> None:
        """A query has come, and its own task was sent."""

    def sealed(self, sender: Sender, group: CodingGroup, extra: Sequence[int]) -> None:
        """A group is full, or its time is over; these are the code's extra tasks."""

    def queued(self, sender: Sender, attempt: Attempt) -> None:
        """A data task waits for a worker."""

    def begun(self, sender: Sender, attempt: Attempt) -> None:
        """A worker has got a task."""

    def late(self, sender: Sender, attempt: Attempt, again: bool, runs: bool) -> Then:
        """A task has run longer than its kind normally does; if not `runs`, it has only waited."""
        return Then.PASS

    def lost(self, sender: Sender, attempt: Attempt) -> None:
        """A data task is lost."""

    def withheld(self, sender: Sender, query: Query) -> None:
        """A query's decoded answer was withheld, and its own is under way."""

    def weakened(self, sender: Sender, query: Query) -> None:
        """A query has lost an attempt, and others are under way."""


@dataclass(frozen=True)
class Joined(Policy):
    """Several policies at once: each event goes to all, in their order."""

    joined: tuple[Policy, ...]

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.joined

    @cached_property
    def coded(self) -> bool:
        return any(part.coded for part in self.joined)

    @cached_property
    def hedged(self) -> bool:
        return any(part.hedged for part in self.joined)

    @cached_property
    def backs_late(self) -> bool:
        return any(part.backs_late for part in self.joined)

    def fewest_workers(self, code: CodeRules) -> int:
        return max(part.fewest_workers(code) for part in self.joined)

    def taken(self, sender: Sender, query: Query) -> None:
        for part in self.joined:
            part.taken(sender, query)

    def sealed(self, sender: Sender, group: CodingGroup, extra: Sequence[int]) -> None:
        for part in self.joined:
            part.sealed(sender, group, extra)

    def queued(self, sender: Sender, attempt: Attempt) -> None:
        for part in self.joined:
            part.queued(sender, attempt)

    def begun(self, sender: Sender, attempt: Attempt) -> None:
        for part in self.joined:
            part.begun(sender, attempt)

    def late(self, sender: Sender, attempt: Attempt, again: bool, runs: bool) -> Then:
        then = (part.late(sender, attempt, again, runs) for part in self.joined)
        return next((each for each in then if each is not Then.PASS), Then.PASS)

    def lost(self, sender: Sender, attempt: Attempt) -> None:
        for part in self.joined:
            part.lost(sender, attempt)

    def withheld(self, sender: Sender, query: Query) -> None:
        for part in self.joined:
            part.withheld(sender, query)

    def weakened(self, sender: Sender, query: Query) -> None:
        for part in self.joined:
            part.weakened(sender, query)
