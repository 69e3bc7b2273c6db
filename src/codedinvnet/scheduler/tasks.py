"""What is known of a query, and of each sending of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from codedinvnet.scheduler.group import CodingGroup

NOBODY = -1
"""Stands in place of a worker."""


class State(Enum):
    """The state of a query."""

    WAITING = "waiting"
    DECODING = "decoding"
    DONE = "done"


@dataclass(slots=True)
class Query:
    """What is known of a query."""

    identity: int
    accept_decoded: bool
    deadline: float
    group: CodingGroup
    member: int
    bulk: int = 0
    """How large it is, as a class, since those of one take about as long; 0 if all are alike."""
    state: State = State.WAITING
    attempts: dict[int, Attempt] = field(default_factory=dict)
    """The live attempts of its own data task."""
    copies: int = 0
    """How many copies of it were sent because it was late."""
    fallback: bool = False
    """A decoded answer of low confidence is at hand."""
    late: bool = False
    """It may be guessed."""
    last: bool = False
    """Whatever is decoded for it is accepted."""
    overtime: bool = False
    """Its deadline has passed."""
    losses: int = 0


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
    """It waits before those that are not first."""
    extra: bool = False
    """Somebody else may answer for it: it yields where the line is long."""
    worker: int = NOBODY
    started: float | None = None
    paid: float = 0.0
    """What the budget paid for it."""
    late: bool = False
    """It has taken longer than its kind normally does."""
    shared: bool = False
    """Its query was cancelled; it is computed for the others of its group."""
    together: int = 1
    """How many tasks its worker was at when it began, or computes in the same call."""

    @property
    def number(self) -> int:
        """The task's number in its group, which changes when a group is renumbered."""
        return self.task if self.query is None else self.query.member

    @property
    def kind(self) -> int:
        """What it is timed with: the size of the group, 0 of a data task, -n of one with n more."""
        return 1 - self.together if self.query is not None else self.group.size

    @property
    def bulk(self) -> int:
        """How large its queries are, as a class; that of the largest."""
        return self.query.bulk if self.query is not None else self.group.bulk
