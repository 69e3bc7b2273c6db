"""What the scheduler asks for: the front end carries it out, and so does the simulator."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from codedinvnet.scheduler.auto import Decision


class Send(NamedTuple):
    """Give a worker a task; it has a free slot."""

    worker: int
    attempt: int
    task: int
    members: tuple[int, ...]
    """Queries that the task needs; where they are fewer than `size`, fillers follow."""
    size: int
    """How many queries the task needs, fillers included."""
    group_size: int = 0
    """Members of the group that an extra task is of, fillers included; 0 for a data task that needs
    its own query alone."""


class Call(NamedTuple):
    """Give a worker several data tasks, to be computed at once; it has nothing else to do."""

    sends: tuple[Send, ...]


class Answer(NamedTuple):
    """Answer a query directly from an attempt's output."""

    query: int
    attempt: int
    worker: int
    """That computed it."""


class Decode(NamedTuple):
    """Compute the logits of these members from these outputs.

    Report each with `decoded` or `withheld`.
    """

    group: int
    size: int
    outputs: dict[int, int]
    """Task -> attempt (FILLER for a filler's)."""
    wanted: dict[int, int]
    """Query -> member."""
    guess: bool = False
    """The outputs do not determine these members."""


class AnswerDecoded(NamedTuple):
    """Answer a query with the logits that were decoded for it."""

    query: int


class Fail(NamedTuple):
    """End a query with an error."""

    query: int
    reason: str


class Replace(NamedTuple):
    """End a worker and start another in its place; report with `worker_up`."""

    worker: int
    reason: str


class Complete(NamedTuple):
    """All outputs of a coded group are here: its consistency can be measured for nothing."""

    group: int
    size: int
    outputs: dict[int, int]
    workers: dict[int, int]
    """Task -> the worker that computed it."""


class Forget(NamedTuple):
    """Nothing will ask for the outputs of these attempts, or the images of these queries."""

    attempts: tuple[int, ...]
    queries: tuple[int, ...] = ()


class Decided(NamedTuple):
    """Tell others what is done about late answers from now on; there is nothing to carry out."""

    decision: Decision


Action: TypeAlias = (
    Send | Call | Answer | Decode | AnswerDecoded | Fail | Replace | Complete | Forget | Decided
)

DEADLINE = "deadline"
"""Reason of `Fail`: the query's time was over."""
