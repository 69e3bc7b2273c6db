"""What the scheduler asks for. Actions are plain values: numbers and names, as events are."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias


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
    copy: bool = False
    """It is a copy of a query that is late."""


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
    outputs: tuple[tuple[int, int], ...]
    """Tasks, each with its attempt (FILLER for a filler's)."""
    wanted: tuple[tuple[int, int], ...]
    """Queries, each with its member."""
    guess: bool = False
    """The outputs do not determine these members."""


class AnswerDecoded(NamedTuple):
    """Answer a query with the logits that were decoded for it."""

    query: int


class Fail(NamedTuple):
    """End a query with an error."""

    query: int
    reason: str


class CopyRefused(NamedTuple):
    """A copy of a late query was not sent."""

    query: int
    held_out: bool = False
    """Why: the query is one of the few that get no copies, to show what happens without them
    (`Rules.hold_out`). Otherwise the budget is used up."""


class Replace(NamedTuple):
    """End a worker and start another in its place; report with `worker_up`."""

    worker: int
    reason: str


class Compare(NamedTuple):
    """All outputs of a coded group are here: its consistency can be measured for nothing."""

    group: int
    size: int
    outputs: tuple[tuple[int, int], ...]
    workers: tuple[tuple[int, int], ...]
    """Tasks, each with the worker that computed it."""


class Forget(NamedTuple):
    """Nothing will ask for the outputs of these attempts, or the images of these queries."""

    attempts: tuple[int, ...]
    queries: tuple[int, ...] = ()


class Seen(NamedTuple):
    """What `auto` decides by. Each is of the last queries."""

    normal: float
    """The seconds that a data task normally runs."""
    excess: float
    """What stragglers cost, in normal times a task."""
    load: float
    """The share of the workers' slots that queries find busy."""
    fill: float
    """How full groups were when they were coded; 0 before the first."""
    extra: float
    """Extra work for each query, in service times."""


class Decided(NamedTuple):
    """What `auto` does about late answers from now on; there is nothing to carry out."""

    at: float
    policy: str
    reason: str
    """Why, in a few words."""
    seen: Seen
    """What was measured then."""

    @property
    def summary(self) -> dict[str, Any]:
        """What logs and pages show of it; times are in seconds."""
        numbers = {name: round(value, 4) for name, value in self.seen._asdict().items()}
        return {"does": self.policy, "why": self.reason, **numbers}


Action: TypeAlias = (
    Send
    | Call
    | Answer
    | Decode
    | AnswerDecoded
    | Fail
    | CopyRefused
    | Replace
    | Compare
    | Forget
    | Decided
)


class Snapshot(NamedTuple):
    """What pages, metrics and admission show of a scheduler; it may be out of date."""

    policy: str
    """The chosen one, which may be `auto`."""
    slots: int
    """How many tasks the workers that are up may be at together."""
    waiting: int
    """How many tasks no worker has."""
    delays: tuple[tuple[str, float], ...]
    """Routes, each with the seconds after which a query of its usual size class is late, as is
    measured; routes of which nothing is known are left out."""


DEADLINE = "deadline"
"""Reason of `Fail`: the query's time was over."""
