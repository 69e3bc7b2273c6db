"""What the scheduler knows of a query, and of each attempt at a task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from codedinvnet.scheduler.caches import Prompt
from codedinvnet.scheduler.events import NORMAL
from codedinvnet.scheduler.group import ALIKE, CodingGroup, Traffic


class State(Enum):
    """Where a query stands."""

    WAITING = "waiting"
    """For its own answer, or for enough of its group to decode one."""
    DECODING = "decoding"
    GRACE = "grace"
    """Its deadline has passed, and what is being decoded for it may still come."""
    DONE = "done"


@dataclass(slots=True)
class Query:
    """A query that is not over."""

    identity: int
    takes_decoded: bool
    """Whether a decoded answer will do."""
    deadline: float
    group: CodingGroup
    member: int
    traffic: Traffic = ALIKE
    repeatable: bool = True
    """Whether it may be computed twice."""
    delay: tuple[float, float] | None = None
    """The least and the most seconds after which it is late; None: as measured."""
    state: State = State.WAITING
    attempts: dict[int, Attempt] = field(default_factory=dict)
    """The live attempts at its own data task."""
    copies: int = 0
    """How many copies were sent because it was late."""
    held_out: bool = False
    """Whether it gets no copy, to show what happens without."""
    fallback: int | None = None
    """The live attempt at a cheaper worker."""
    fell_back: bool = False
    """Whether a cheaper worker was asked."""
    losses: int = 0
    answered: float | None = None
    """When one of its own attempts answered it."""
    won_at: int | None = None
    """The level of that attempt if it is a copy, see `Races`."""
    level: int | None = None
    """How late it was when a copy of it was last considered."""
    prompt: Prompt | None = None
    """What workers cache of it; None if they don't."""
    priority: int = NORMAL

    @property
    def is_waiting(self) -> bool:
        """Whether it waits, and nothing is being decoded for it."""
        return self.state is State.WAITING

    @property
    def is_pending(self) -> bool:
        """Whether it has no answer yet."""
        return self.state is not State.DONE

    @property
    def wants_decoded(self) -> bool:
        """Whether it waits, and a decoded answer would help."""
        return self.is_waiting and self.takes_decoded


@dataclass(slots=True)
class Attempt:
    """One sending of a task."""

    identity: int
    group: CodingGroup
    query: Query | None
    """The query of a systematic code's data task; None for every other task."""
    task: int
    queued: float
    first: bool = False
    """It waits ahead of those that are not first."""
    extra: bool = False
    """Another attempt may make it needless: it yields where the line is long."""
    hedge: bool = False
    """It is a copy that was sent because its query was late."""
    worker: int | None = None
    started: float | None = None
    place: int = 1
    """How many tasks its worker had when it began, with this one."""
    ahead: float | None = None
    """When the first of those was over that its worker had when it began."""
    probes: bool = False
    """It may be sent behind a late task, to see if it overtakes it."""
    behind: int | None = None
    """The late task that its worker could not go on from when it began."""
    paid: float = 0.0
    """What the budget paid for it."""
    level: int = 0
    """How late its query was when it was sent as a copy, see `Races`."""
    answered: bool = False
    """Its worker has sent the first of an answer, and may go on with it."""
    work: float | None = None
    """What it took, in service times; known of copies that were computed."""
    late: bool = False
    """It has run longer than its kind normally does."""
    shared: bool = False
    """Its query was cancelled, but the others of its group may be decoded with its output."""
    together: int = 1
    """How many tasks its worker had when it began, or computes in the same call."""
    fallback: bool = False
    """It is for a cheaper worker, and is none of its query's own attempts."""
    uncached: tuple[int, ...] = ()
    """Of its prompt, by worker, when it began to wait: bytes that are not cached there."""
    new: Traffic | None = None
    """What its worker computes of its prompt."""

    @property
    def priority(self) -> int:
        """Which tasks wait for which; parities are as normal as most."""
        return NORMAL if self.query is None else self.query.priority

    @property
    def number(self) -> int:
        """The task's number in its group, which changes when a group is renumbered."""
        return self.task if self.query is None else self.query.member

    @property
    def kind(self) -> int:
        """What it is timed with: 0 for a data task, -n for one of n + 1, else the group's size."""
        return 1 - self.together if self.query is not None else self.group.size

    @property
    def traffic(self) -> Traffic:
        """That of its query, or of what is new of it, or of the largest in its group."""
        if self.new is not None:
            return self.new
        return self.query.traffic if self.query is not None else self.group.traffic


@dataclass
class InFlight:
    """The queries, attempts and groups that are not over."""

    queries: dict[int, Query] = field(default_factory=dict)
    attempts: dict[int, Attempt] = field(default_factory=dict)
    groups: dict[int, CodingGroup] = field(default_factory=dict)
    open_group: CodingGroup | None = None
    computed_by: dict[int, int] = field(default_factory=dict)
    """Attempt -> worker, of the outputs in use."""
    count: int = 0

    def number(self) -> int:
        """Return a number that no query, attempt or group has."""
        self.count += 1
        return self.count

    def pending(self, group: CodingGroup) -> Iterator[Query]:
        """Yield the members of a group that are not over."""
        for identity in group.members:
            if (query := self.queries.get(identity)) is not None:
                yield query

    def is_wanted(self, group: CodingGroup, task: int) -> bool:
        """Return whether a member that a sealed group's task needs has no answer yet."""
        return any(member in self.queries for member in group.needs(task))

    def is_needed(self, attempt: Attempt) -> bool:
        """Return whether the output of an attempt may still be of use."""
        if attempt.query is None:
            return self.is_wanted(attempt.group, attempt.number)
        if not attempt.shared:
            return attempt.query.state is not State.DONE
        return any(member in self.queries for member in attempt.group.members)

    def has_backup(self, group: CodingGroup) -> bool:
        """Return whether a group's first extra task is under way and not late."""
        live = () if group.is_open else group.live.get(group.code.k, ())
        return any(not self.attempts[each].late for each in live)

    def leave(self, query: Query) -> None:
        """Take a query that no worker has begun out of its open group."""
        group = query.group
        group.leave(query.identity)
        if not group.members:
            del self.groups[group.identity]
            self.open_group = None
            return
        live = [self.attempts[a] for attempts in group.live.values() for a in attempts]
        members = [*self.pending(group)]
        members += [a.query for a in live if a.query is not None]  # copies of answered ones, too
        for member in members:
            member.member = group.members.index(member.identity)
