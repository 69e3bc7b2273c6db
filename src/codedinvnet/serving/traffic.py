"""The last requests and tasks, from which `codedinvnet advise` simulates what is to come.

All is bounded: the newest REQUESTS requests and TASKS tasks are kept. A slow worker is
avoided and may have none of these. So the newest OWN data tasks of each worker are kept besides.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable
from typing import NamedTuple, TypeVar

from codedinvnet.evaluation.quantiles import rank_of
from codedinvnet.serving.answers import Answered, QueryFailed

REQUESTS, TASKS = 10_000, 20_000
"""How many are kept."""
OWN = 20
"""How many of each worker are kept, however long ago they were."""
NEWEST = 3000
"""Of them so many are looked at for the chart of the page."""
REFUSED, CANCELLED = "refused", "cancelled"
"""Why a request is none of those that ended."""
T = TypeVar("T")


class SeenRequest(NamedTuple):
    """A request that has ended. Times are in seconds."""

    at: float
    queries: int
    seconds: float | None
    """From its coming until its last answer; None if one is missing."""
    besides: float
    """The part of that for which no worker was waited for: reading it, and making the answer."""
    made_up: int
    """Its answers that were decoded or guessed."""


class Unserved(NamedTuple):
    """A request that was not answered, or that nobody waited for any more."""

    at: float
    """When it came, or was refused."""
    why: str
    """`refused` or `cancelled`."""


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


class Traffic:
    """What came lately.

    Attributes:
        requests: the newest ones, by when they ended.
        tasks: likewise.
        unserved: the newest requests that were refused or cancelled; none is among `requests`.
        several: the newest calls of several data tasks, none of which is among `tasks`.
        own: of each worker its newest data tasks, some of which may be older than all of `tasks`.
    """

    def __init__(self) -> None:
        self.requests: deque[SeenRequest] = deque(maxlen=REQUESTS)
        self.unserved: deque[Unserved] = deque(maxlen=REQUESTS)
        self.tasks: deque[SeenTask] = deque(maxlen=TASKS)
        self.several: deque[SeenTask] = deque(maxlen=NEWEST)
        self.own: defaultdict[int, deque[SeenTask]] = defaultdict(lambda: deque(maxlen=OWN))
        self.since = time.monotonic()
        """When the policy was changed last."""

    def gapless(self) -> list[SeenRequest]:
        """Return the newest requests, without those that came when others have been forgotten.

        The oldest by their end are forgotten first. One that took long came among many of these:
        the time from its coming until theirs would look like one in which nothing came.
        """
        requests = list(self.requests)
        seconds = [r.seconds for r in requests if r.seconds is not None]
        if len(requests) < REQUESTS or not seconds:
            return requests
        ended = min(r.at + r.seconds for r in requests if r.seconds is not None)
        since = ended - min(seconds)  # what is forgotten took as long, and has ended before
        return [request for request in requests if request.at >= since]

    def refused(self) -> None:
        """Take in a request that is refused now."""
        self.unserved.append(Unserved(time.monotonic(), REFUSED))

    async def follow(
        self, began: float, ending: Awaitable[list[Answered | QueryFailed]], read: float = 0.0
    ) -> list[Answered | QueryFailed]:
        """Wait until the queries of a request have ended, and take in how; see `ended`."""
        try:
            found = await ending
        except asyncio.CancelledError:
            self._cancelled(began - read)
            raise
        return self.ended(began, found, read)

    def ended(
        self, began: float, found: list[Answered | QueryFailed], read: float = 0.0
    ) -> list[Answered | QueryFailed]:
        """Take in how the queries of a request ended; one that was cancelled tells nothing else.

        Args:
            began: when its queries were taken (`time.monotonic()`).
            found: how each ended.
            read: the seconds that reading and parsing had taken until then.
        """
        answers = [answer for answer in found if isinstance(answer, Answered)]
        if answers or not any(str(answer) == "cancelled" for answer in found):
            work = max((answer.work_seconds for answer in answers), default=0.0)
            seconds = max((answer.seconds for answer in answers), default=0.0)
            made_up = sum(answer.outcome != "direct" for answer in answers)
            whole = read + seconds if len(answers) == len(found) else None
            besides = read + max(0.0, seconds - work)
            self.requests.append(SeenRequest(began - read, len(found), whole, besides, made_up))
        else:
            self._cancelled(began - read)
        return found

    def _cancelled(self, at: float) -> None:
        self.unserved.append(Unserved(at, CANCELLED))

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
        done = (*_newest(self.tasks), *self.several)
        busy = sum(task.occupied for task in done if task.at + task.occupied >= since)
        return {
            "p50": round(1000 * latency[rank_of(len(latency), 0.5)], 2),
            "p99": round(1000 * latency[rank_of(len(latency), 0.99)], 2),
            "work": round(busy / normal / queries, 3),
        }

    def did(self, worker: int, members: int, occupied: float, held: float) -> None:
        """Take in a task that a worker has just done."""
        task = SeenTask(time.monotonic() - occupied, worker, members, occupied, held)
        self.tasks.append(task)
        if not members:
            self.own[worker].append(task)

    def did_several(self, worker: int, occupied: float, held: float) -> None:
        """Take in a call of several data tasks, which tells what they took together alone."""
        self.several.append(SeenTask(time.monotonic() - occupied, worker, 0, occupied, held))

    def earlier(self) -> list[SeenTask]:
        """Return those of workers' newest data tasks that were done before all of `tasks`."""
        tasks = tuple(self.tasks)
        first = tasks[0].at + tasks[0].occupied if tasks else 0.0
        own = (task for kept in tuple(self.own.values()) for task in tuple(kept))
        return [task for task in own if task.at + task.occupied < first]


def _newest(seen: deque[T]) -> list[T]:
    """Return the newest entries, enough for a few seconds, the newest last."""
    return list(seen)[-NEWEST:]
