"""What happens to the scheduler. Events are plain values: numbers and names, which fit in bytes."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

HIGH, NORMAL, LOW = PRIORITIES = range(3)
"""Where all workers are busy, queries wait until those of higher priority are sent."""


class Submit(NamedTuple):
    """Queries have come, which make one request."""

    queries: tuple[int, ...]
    """Their numbers, which no other query has."""
    deadline: float
    """When they are answered by a guess or fail."""
    accept_decoded: bool = True
    """Whether a decoded answer will do."""
    size_class: int = 0
    """How large each is, as a class; times are learned for each class."""
    route: str = ""
    """What they ask; times are learned for each route."""
    repeatable: bool = True
    """Whether a query may be computed twice. If not, it is not copied, and a lost attempt ends it
    unless it was never sent."""
    delay: tuple[float, float] | None = None
    """The least and the most seconds after which it is late; None: as measured. Before times are
    known it is late after the most, if that is finite."""
    keys: tuple[tuple[int, int], ...] = ()
    """What each begins with, for workers that cache it: see `Prompt`."""
    size: int = 0
    """Bytes of each, if there are keys."""
    priority: int = NORMAL
    """One of `PRIORITIES`."""


class Resumed(NamedTuple):
    """A query comes that another scheduler began."""

    submit: Submit
    """As the other scheduler got it, for this query alone."""
    attempts: tuple[tuple[int, int, float], ...]
    """Each attempt that is under way, its worker, and when it was begun. No attempt of this
    scheduler's own has one of these numbers."""


class Completed(NamedTuple):
    """An attempt's output is here."""

    attempt: int
    is_usual: bool = True
    """Whether its time shows how long such tasks take."""
    keeps_slot: bool = False
    """Its worker goes on with it, such as a stream, until `Released`."""


class Released(NamedTuple):
    """A worker has done an attempt's work; its answer is still on the way, or all here."""

    worker: int
    attempt: int


class Failed(NamedTuple):
    """An attempt raised on its worker, or its answer was lost on the way."""

    attempt: int
    reason: str
    final: bool = False
    """Whether its query ends, unless something under way may answer it."""
    unsent: bool = False
    """Whether the worker saw nothing of it."""


class Cancelled(NamedTuple):
    """An attempt that nobody needs was broken off, and its worker is free."""

    attempt: int


class WorkerLost(NamedTuple):
    """A worker is dead: its tasks are lost, and it is to be replaced."""

    worker: int
    reason: str
    unsent: tuple[int, ...] = ()
    """The attempts that it never got: their queries may be sent again whatever they are."""


class WorkerUp(NamedTuple):
    """A worker is ready again."""

    worker: int


class Decoded(NamedTuple):
    """The answer that a `Decode` asked for is here."""

    query: int


class Withheld(NamedTuple):
    """There is no decoded answer to a query, or it may not be released: it waits for its own."""

    query: int


class Gone(NamedTuple):
    """The clients of these queries are gone; queries that are over are ignored."""

    queries: tuple[int, ...]


class PolicyChanged(NamedTuple):
    """Another policy holds from now on."""

    policy: str


class TimerDue(NamedTuple):
    """The time that the scheduler asked for has come."""


Event: TypeAlias = (
    Submit
    | Resumed
    | Completed
    | Released
    | Failed
    | Cancelled
    | WorkerLost
    | WorkerUp
    | Decoded
    | Withheld
    | Gone
    | PolicyChanged
    | TimerDue
)
