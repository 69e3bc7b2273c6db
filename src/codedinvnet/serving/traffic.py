"""The last requests and tasks, from which `codedinvnet advise` simulates what is to come.

All is bounded: the newest REQUESTS requests and TASKS tasks are kept.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from codedinvnet.codes.rules import as_json
from codedinvnet.quantiles import rank_of
from codedinvnet.serving.answers import Answered, QueryFailed

if TYPE_CHECKING:  # a simulation does without what computes
    from codedinvnet.serving.frontend import FrontEnd

REQUESTS, TASKS = 10_000, 20_000
"""How many are kept."""
NEWEST = 3000
"""Of them so many are looked at for the chart of the page."""
SCHEMA = 1
T = TypeVar("T")
KIND = "traffic"


class SeenRequest(NamedTuple):
    """A request that has ended. Times are in seconds."""

    at: float
    queries: int
    seconds: float | None
    """Until its last answer; None if one is missing."""
    besides: float
    """The part of that which the front end took when all answers were there."""
    made_up: int
    """Its answers that were decoded or guessed."""


class SeenTask(NamedTuple):
    """A task that was done. Times are in seconds."""

    at: float
    worker: int
    members: int
    """0 of a data task; else the members of its group."""
    occupied: float
    """For how long its worker was at it."""
    held: float
    """For how long its answer was on the way after that."""


@dataclass(frozen=True)
class Known:
    """What is known of a model before anything is measured.

    Attributes:
        encode_share: what encoding an extra task takes for each member, in service times.
        normal: the share of direct answers that are right; None if it is not known.
        made_up: size of the group -> the share of answers made up in it that are right.
    """

    encode_share: float = 0.0
    normal: float | None = None
    made_up: Mapping[int, float] = field(default_factory=dict)


class Traffic:
    """What came lately.

    Attributes:
        requests: the newest ones, by when they ended.
        tasks: likewise.
    """

    def __init__(self) -> None:
        self.requests: deque[SeenRequest] = deque(maxlen=REQUESTS)
        self.tasks: deque[SeenTask] = deque(maxlen=TASKS)
        self.since = time.monotonic()
        """When the policy was changed last."""

    def ended(
        self, began: float, found: list[Answered | QueryFailed]
    ) -> list[Answered | QueryFailed]:
        """Take in how the queries of a request ended; one that was cancelled tells nothing."""
        answers = [answer for answer in found if isinstance(answer, Answered)]
        if answers or not any(str(answer) == "cancelled" for answer in found):
            work = max((answer.work_seconds for answer in answers), default=0.0)
            seconds = max((answer.seconds for answer in answers), default=0.0)
            made_up = sum(answer.outcome != "direct" for answer in answers)
            whole = seconds if len(answers) == len(found) else None
            self.requests.append(
                SeenRequest(began, len(found), whole, max(0.0, seconds - work), made_up)
            )
        return found

    def lately(self, seconds: float, normal: float) -> dict[str, float] | None:
        """Return p50 and p99 of the requests that ended in the last seconds, in ms, and the work.

        Args:
            seconds: how long ago a request may have ended.
            normal: what a data task takes, in seconds; work is in these, for each query.
        """
        since = time.monotonic() - seconds
        ended = [r for r in _newest(self.requests) if r.at + (r.seconds or seconds) >= since]
        queries = sum(request.queries for request in ended)
        latency = sorted(r.seconds for r in ended if r.seconds is not None)
        if not latency or not normal:
            return None
        busy = sum(t.occupied for t in _newest(self.tasks) if t.at + t.occupied >= since)
        return {
            "p50": round(1000 * latency[rank_of(len(latency), 0.5)], 2),
            "p99": round(1000 * latency[rank_of(len(latency), 0.99)], 2),
            "work": round(busy / normal / queries, 3),
        }

    def did(self, worker: int, members: int, occupied: float, held: float) -> None:
        """Take in a task that a worker has just done."""
        self.tasks.append(SeenTask(time.monotonic() - occupied, worker, members, occupied, held))


def _newest(seen: deque[T]) -> list[T]:
    """Return the newest entries, enough for a few seconds, the newest last."""
    return list(seen)[-NEWEST:]


def told(front: FrontEnd, known: Known) -> dict[str, Any]:
    """Return what `GET /traffic` says. May be called in a thread while the service goes on."""
    scheduler, rules, traffic = front.scheduler, front.rules, front.times.traffic
    requests, tasks = tuple(traffic.requests), tuple(traffic.tasks)
    start = min((r.at for r in requests), default=traffic.since)
    code = scheduler.offered
    return {
        "schema_version": SCHEMA,
        "kind": KIND,
        "model": front.served.name,
        **front.choices.told(scheduler.chosen),
        "since_s": round(traffic.since - start, 3),
        "seconds": round(time.monotonic() - start, 3),
        "rules": {
            "workers": len(scheduler.binding.up),
            "slots": rules.slots,
            "routing": rules.routing,
            "k": 1 if code is None else code.k,
            "group_timeout_ms": 1000 * rules.group_timeout,
            "hang_timeout_ms": 1000 * rules.hang_timeout,
            "deadline_ms": 1000 * front.deadline,
            "max_pending": rules.max_pending,
            "extra": rules.hedge_share,
        },
        "code": None if code is None else as_json(code),
        "encode_share": known.encode_share,
        "right": _right(front, known),
        "requests": [
            [
                round(1000 * (r.at - start), 2),
                r.queries,
                None if r.seconds is None else round(1000 * r.seconds, 2),
                round(1000 * r.besides, 3),
                r.made_up,
            ]
            for r in requests
        ],
        "tasks": [
            [
                round(1000 * (t.at - start), 2),
                t.worker,
                t.members,
                round(1000 * t.occupied, 3),
                round(1000 * t.held, 3),
            ]
            for t in tasks
        ],
        "losses": [
            [round(1000 * (x.at - start), 2), x.worker, x.kind, round(1000 * x.seconds, 1)]
            for x in tuple(front.supervisor.losses)
        ],
    }


def _right(front: FrontEnd, known: Known) -> dict[str, Any] | None:
    """Return how often answers are right: by labels, else as the service's own checks have it."""
    if known.normal is not None and known.made_up:
        made_up = {str(size): share for size, share in known.made_up.items()}
        return {"by": "labels", "normal": known.normal, "made_up": made_up}
    agreement = front.metrics.live_agreement()
    if agreement is None:
        return None
    return {"by": "direct answers", "normal": 1.0, "made_up": {str(front.choices.size): agreement}}
