"""The policies: what is done about answers that are late or missing.

A policy is a value with behaviour. It turns each event into launches, which the dispatcher sends if
the budget allows. `a | b` does both: each event goes to `a` first. To add a policy, write a
subclass of `Policy` here and give it a name in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from codedinvnet.scheduler.group import CodingGroup
from codedinvnet.scheduler.queries import Attempt, Query

if TYPE_CHECKING:
    from codedinvnet.scheduler.dispatch import Dispatcher


class Launch(NamedTuple):
    """A task that a policy wants to be sent in addition to the queries' own."""

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
    """It is looked at again after as long again."""


@dataclass(frozen=True)
class Policy:
    """What is done about late and missing answers. This one does nothing."""

    title: ClassVar[str] = "uncoded"

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies that it is composed of."""
        return (self,)

    def __or__(self, other: Policy) -> Policy:
        return Joined(self.parts + other.parts)

    def has(self, kind: type[Policy]) -> bool:
        """Tell whether a part of it is of a kind."""
        return any(isinstance(part, kind) for part in self.parts)

    @cached_property
    def name(self) -> str:
        """Its name on the command line."""
        return "+".join(part.title for part in self.parts)

    @cached_property
    def coded(self) -> bool:
        """Whether it sends a code's extra tasks with every group."""
        return self.has(Parity)

    @cached_property
    def hedged(self) -> bool:
        """Whether it does something about a late task."""
        return self.adapts or any(type(part).late is not Policy.late for part in self.parts)

    @cached_property
    def backs_late(self) -> bool:
        """Whether it sends a code's extra task when a query is late."""
        return self.has(Backup)

    @cached_property
    def adapts(self) -> bool:
        """Whether it changes while it runs, by what is measured."""
        return self.has(Auto)

    @property
    def copies(self) -> int:
        """How many copies of each query it sends at once."""
        return max([1, *(part.times for part in self.parts if isinstance(part, Replicate))])

    @property
    def takes_code(self) -> bool:
        """Whether a code is of any use to it."""
        return self.coded or self.adapts

    # Events

    def taken(self, on: Dispatcher, query: Query) -> None:
        """A query has come, and its own task was sent."""

    def sealed(self, on: Dispatcher, group: CodingGroup, extra: Sequence[int]) -> None:
        """A group is full, or its time is over; these are the code's extra tasks."""

    def queued(self, on: Dispatcher, attempt: Attempt) -> None:
        """A data task waits for a worker."""

    def begun(self, on: Dispatcher, attempt: Attempt) -> None:
        """A worker was given a task."""

    def late(self, on: Dispatcher, attempt: Attempt, again: bool, runs: bool) -> Then:
        """A task has run longer than its kind normally does; if not `runs`, it has only waited."""
        return Then.PASS

    def lost(self, on: Dispatcher, attempt: Attempt) -> None:
        """A data task is lost."""

    def withheld(self, on: Dispatcher, query: Query) -> None:
        """A query's decoded answer was withheld, and its own is under way."""

    def weakened(self, on: Dispatcher, query: Query) -> None:
        """A query has lost an attempt, and others are under way."""


@dataclass(frozen=True)
class Hedge(Policy):
    """Copies a query when all its attempts are late, and again when a copy is."""

    title: ClassVar[str] = "hedge"

    def begun(self, on: Dispatcher, attempt: Attempt) -> None:
        if attempt.query is not None:
            on.watch(attempt)

    def late(self, on: Dispatcher, attempt: Attempt, again: bool, runs: bool) -> Then:
        query = attempt.query
        if query is None:
            self._both(on, attempt)
        elif runs and self._wants(on, query) and not self._copy(on, query):
            return Then.WATCH
        return Then.DONE

    def _both(self, on: Dispatcher, attempt: Attempt) -> None:
        """Send a late extra task once more, and copy the queries that it was sent for."""
        group, task = attempt.group, attempt.number
        needed = group.needs(task)
        waiting = [on.flying.queries[each] for each in needed if each in on.flying.queries]
        if waiting and len(group.live[task]) < on.tuning.most_backups:
            on.launch(Launch(group, task, first=True, urgent=True))
        for query in waiting:
            if self._wants(on, query):
                self._copy(on, query)

    def withheld(self, on: Dispatcher, query: Query) -> None:
        if len(query.attempts) > 1 or not self._copy(on, query):
            self.weakened(on, query)

    def weakened(self, on: Dispatcher, query: Query) -> None:
        if not query.attempts or not self._wants(on, query):
            return
        backed = query.takes_decoded and on.flying.has_backup(query.group)
        if backed or query.fallback is not None or not self._copy(on, query):
            on.watch(next(iter(query.attempts.values())), on.now)

    def _wants(self, on: Dispatcher, query: Query) -> bool:
        """Tell whether all that is under way for a query is late, and a copy may be sent."""
        if not query.is_waiting or not query.repeatable or query.copies >= on.tuning.most_copies:
            return False
        return all(attempt.late for attempt in query.attempts.values())

    def _copy(self, on: Dispatcher, query: Query) -> bool:
        return on.launch(Launch(query.group, query.member, query, True, urgent=True, hedge=True))


@dataclass(frozen=True)
class Parity(Policy):
    """Sends a code's extra tasks with every group."""

    title: ClassVar[str] = "coded"

    def sealed(self, on: Dispatcher, group: CodingGroup, extra: Sequence[int]) -> None:
        for task in extra:
            on.launch(Launch(group, task))


@dataclass(frozen=True)
class Backup(Policy):
    """Asks a code's cheap extra task, such as a small backup, about late queries."""

    title: ClassVar[str] = "backup"

    def begun(self, on: Dispatcher, attempt: Attempt) -> None:
        if attempt.query is None:
            on.watch(attempt)

    def late(self, on: Dispatcher, attempt: Attempt, again: bool, runs: bool) -> Then:
        if attempt.query is None:
            return Then.PASS
        if self._send(on, attempt) or (not again and on.flying.has_backup(attempt.group)):
            return Then.WATCH
        return Then.PASS

    def lost(self, on: Dispatcher, attempt: Attempt) -> None:
        self._send(on, attempt)

    def _send(self, on: Dispatcher, attempt: Attempt) -> bool:
        """Send a query's group its extra task, once; tell whether it was sent."""
        query, group = attempt.query, attempt.group
        k = group.code.k
        if query is None or not query.wants_decoded:
            return False
        if group.is_open or not group.code.r or k in group.outputs:
            return False
        if group.live.get(k) or group.retries:
            return False
        return on.launch(Launch(group, k, first=True, urgent=True))


@dataclass(frozen=True)
class Fallback(Policy):
    """Asks a cheaper worker about a late query, or at once where no other is up."""

    title: ClassVar[str] = "fallback"

    def taken(self, on: Dispatcher, query: Query) -> None:
        if not on.assigner.slots_up:
            on.fall_back(query)

    def queued(self, on: Dispatcher, attempt: Attempt) -> None:
        late = on.stats.late(attempt.kind, None, attempt.traffic)
        if late is not None:
            on.timers.set(on.now + late, "waits", attempt.identity)

    def late(self, on: Dispatcher, attempt: Attempt, again: bool, runs: bool) -> Then:
        query = attempt.query
        waits = query is not None and query.fallback is not None and not again
        return Then.WATCH if on.fall_back(query) or waits else Then.PASS

    def lost(self, on: Dispatcher, attempt: Attempt) -> None:
        on.fall_back(attempt.query)


@dataclass(frozen=True)
class Replicate(Policy):
    """Sends several copies of each query at once."""

    times: int = 2
    title: ClassVar[str] = "replicate"

    def taken(self, on: Dispatcher, query: Query) -> None:
        for _ in range(1, self.times):
            on.launch(Launch(query.group, query.member, query))


@dataclass(frozen=True)
class Auto(Policy):
    """Goes by what `auto.Auto` decides from measurements."""

    title: ClassVar[str] = "auto"
    adapts: ClassVar[bool] = True


@dataclass(frozen=True)
class Joined(Policy):
    """Several policies at once."""

    joined: tuple[Policy, ...]

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.joined

    def taken(self, on: Dispatcher, query: Query) -> None:
        for part in self.joined:
            part.taken(on, query)

    def sealed(self, on: Dispatcher, group: CodingGroup, extra: Sequence[int]) -> None:
        for part in self.joined:
            part.sealed(on, group, extra)

    def queued(self, on: Dispatcher, attempt: Attempt) -> None:
        for part in self.joined:
            part.queued(on, attempt)

    def begun(self, on: Dispatcher, attempt: Attempt) -> None:
        for part in self.joined:
            part.begun(on, attempt)

    def late(self, on: Dispatcher, attempt: Attempt, again: bool, runs: bool) -> Then:
        then = (part.late(on, attempt, again, runs) for part in self.joined)
        return next((each for each in then if each is not Then.PASS), Then.PASS)

    def lost(self, on: Dispatcher, attempt: Attempt) -> None:
        for part in self.joined:
            part.lost(on, attempt)

    def withheld(self, on: Dispatcher, query: Query) -> None:
        for part in self.joined:
            part.withheld(on, query)

    def weakened(self, on: Dispatcher, query: Query) -> None:
        for part in self.joined:
            part.weakened(on, query)


UNCODED, CODED, HEDGE, AUTO = Policy(), Parity(), Hedge(), Auto()
BACK_LATE, FALL_BACK = Backup() | HEDGE, Fallback() | HEDGE
"""What `auto` does with a small backup, and where there are fallbacks."""
POLICIES = {
    policy.name: policy
    for policy in (
        UNCODED,
        Replicate(),
        HEDGE,
        CODED,
        CODED | HEDGE,
        AUTO,
    )
}
"""What a service is started with, by name."""
AUTO_WITH = "auto+"
"""The beginning of the name of `auto` with a method at hand."""
WITH_HEDGE = "+hedge"
"""The end of the name of a method that is hedged as well."""
