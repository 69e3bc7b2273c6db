"""Which worker takes which task.

1. A task that no worker is at waits in one line, by priority, and of one priority in the order of
   coming. Tasks that are *first* (copies of late queries, and what was lost) wait before the others
   of their priority.
2. A worker has slots. One with a free slot takes the first task that it may. Of several workers,
   those that are not slow come first, then the least loaded, then the one whose turn it is. One
   that answered unusually (an error) loses its place among the turns, or queries of two kinds that
   come in turn would meet their own workers for ever. A worker that is *stuck*, at a late task and
   without an answer since, comes after the others. Where the number of slots is found, the last one
   is beyond what a worker computes at once. It is filled only while `ahead` of a needed task or
   more waits for each worker: of fewer, each begins sooner at whichever worker is done first. A
   late task takes no slot of a worker that has answered another since: it does not compute it. A
   stuck worker without room gets one task behind the late one, if most that were sent so overtook
   it, and otherwise one in `overtaking_probe`, to find that out.
3. Tasks of one group are kept apart while they are pending. A worker may take a task if it has no
   other of its group, holds no answer of its query, and has failed no task of its group. If no such
   worker is up, any will do that holds none and has failed none; if none of these is up, any, but
   no worker is at one query twice: the copy would wait for the original.
4. A slow worker does not get a task that the others will have finished sooner. They take one
   task of the line in (normal time) / (what they compute at once). A worker that takes s times as
   long as normal therefore passes by the first (s - 1) x (what they compute) tasks. No task is
   passed by once it has waited for as long as the slow worker would lose, (s - 1) x (normal time).
   None is where more workers than one and more than `few_slow` are slow: the others have only not
   been seen to be slow yet.
5. Workers may be fallbacks: cheaper ones, for late queries alone. Their tasks wait in a line of
   their own, which they take in the order of coming. To the other rules neither exists.
6. With `worker_batch` = n a worker computes up to n data tasks in one call. Once every idle worker
   has a task, those with a data task that are not slow take more of them. Rule 3 holds for these as
   well, and no query is twice in a call. One whose task was lost before is computed alone, since
   others may fail by it. A call gets only as many as a worker that takes `slow` times as long as is
   normal can do without being taken for hung. Nothing joins a call that has begun. A worker is free
   when all of its call is over.
7. Workers may cache the beginnings of queries (`Caches`), so that one computes less of a query than
   others. A task waits for the worker that would take the least time for it, for `stays` times as
   long as the one that could take it now would take longer (a ski rental: whatever it waits for,
   it loses at most a fixed number of times what was best in hindsight). A worker that has been at
   a prompt for `slow` times as long as normal, or longer, is as slow as that shows by now.
8. A worker that is new, or back, may be cold. It gets one task at a time, and one more for each
   that it does in normal time, until it has all its slots, and for `ramp` seconds at most. Where
   all come back, or more than `few_slow` of them, none is held back: the others could not do their
   work.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from codedinvnet.scheduler.caches import Caches
from codedinvnet.scheduler.concurrency import Concurrency
from codedinvnet.scheduler.events import PRIORITIES
from codedinvnet.scheduler.group import Traffic, size_class
from codedinvnet.scheduler.order import WorkerOrder
from codedinvnet.scheduler.queries import Attempt, Query
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.stats import LatencyStats


class Room(Enum):
    """Where a worker takes a task that it gets (rule 2)."""

    FREE = "in a free slot"
    AHEAD = "beyond what it computes at once"
    BEHIND = "behind a late task"


@dataclass(slots=True)
class Worker:
    """What the rules know of a worker."""

    running: dict[int, Attempt] = field(default_factory=dict)
    """The tasks that it is at."""
    turn: float = 0.0
    """When it is to have the next task, of workers that are equal."""
    stuck: bool = False
    """A task that it has is late, and it has done none since."""

    @property
    def has_late(self) -> bool:
        """Whether a task that it has is late."""
        return any(attempt.late for attempt in self.running.values())

    @property
    def busy_since(self) -> float | None:
        """When it began the oldest task that it is at; None if it is at none."""
        return next((attempt.started for attempt in self.running.values()), None)


@dataclass(slots=True)
class Ramp:
    """A worker that may be cold (rule 8)."""

    until: float
    tasks: int = 1
    """How many it gets at a time."""


class TaskAssigner:
    """The workers, and the tasks that wait for one.

    Args:
        rules: how many workers and slots there are.
        stats: which workers are slow.

    Attributes:
        workers: all of them.
        waiting: how many tasks no worker is at.
        needed: how many of them are not extra; those of rule 5 left out.
        running: how many tasks workers are at; those of rule 5 left out.
        load: the share of the slots that queries found busy, of about `load_memory` of them.
        up: the workers that are up.
        recheck: when a task that was passed by is to be offered again; None if none was.
    """

    def __init__(self, rules: Rules, stats: LatencyStats) -> None:
        count, self._tuning = rules.workers, rules.tuning
        self.workers = [Worker(turn=i - count) for i in range(count)]
        self.up = set(range(count))
        self.waiting = 0
        self.needed = 0
        self.running = 0
        self.load = 0.0
        self.recheck: float | None = None
        self.concurrency = Concurrency(count, rules.slots, rules.tuning)
        self.caches = Caches(count, rules.tuning.keys_kept)
        """Where beginnings are, or will be once what is under way is computed."""
        self._computed = Caches(count, rules.tuning.keys_kept)
        """Where they are by now."""
        self._fallback_slots = rules.fallback_slots
        self._batch, self._hang_timeout = rules.worker_batch, rules.hang_timeout
        self._composing: set[int] = set()
        """The workers whose calls have not begun (rule 6)."""
        self._mains = rules.mains
        """The workers before this one are no fallbacks."""
        self._mains_up = set(range(self._mains))
        self._stats = stats
        self._ramps: dict[int, Ramp] = {}
        self._lines = [OrderedDict[int, Attempt]() for _ in range(2 * len(PRIORITIES))]
        """The tasks that wait: of each priority those that are first, and the others."""
        self._order = WorkerOrder(count)
        """The workers with a free slot."""
        self._apart: OrderedDict[int, Attempt] = OrderedDict()
        """The tasks of rule 5 that wait, and below the workers that have a slot for them."""
        self._fallbacks = WorkerOrder(count)
        self._turn = 0
        self._random = random.Random(0)
        self._added = 0
        self._overtook = 0.0
        """The share of the tasks sent behind late ones that overtook them."""
        self.reorder_all()

    @property
    def slots_up(self) -> int:
        """How many slots the workers that are up have in all."""
        return self.concurrency.total(self._mains_up)

    @property
    def _few_slow(self) -> bool:
        """Whether so few workers are slow that the others must be quicker."""
        return len(self._mains_up & self._stats.slow) <= self._most_slow

    @property
    def _most_slow(self) -> float:
        """How many workers can be slow, or cold, while the others are not."""
        return max(1.0, self._tuning.few_slow * len(self._mains_up))

    def meets(self, queries: int) -> None:
        """Measure the load that a request of so many queries finds."""
        busy = self.running / max(1, self.slots_up)
        if self._batch > 1:
            busy = min(1.0, busy)
        self.load += (busy - self.load) * min(1.0, queries / self._tuning.load_memory)

    def add(self, attempt: Attempt) -> None:
        """Let a task wait for a worker."""
        self.waiting += 1
        if attempt.fallback:
            self._apart[attempt.identity] = attempt
            return
        self.needed += not (attempt.extra or attempt.hedge)
        if not attempt.first:
            self._added += 1
            attempt.probes = self._added % self._tuning.overtaking_probe == 0
        self._look_up(attempt)
        self._line(attempt)[attempt.identity] = attempt

    def remove(self, attempt: Attempt) -> None:
        """Take a task that waits out of the line."""
        self.waiting -= 1
        if self._apart.pop(attempt.identity, None) is not None:
            return
        self._leave(attempt)

    def _line(self, attempt: Attempt) -> OrderedDict[int, Attempt]:
        return self._lines[2 * attempt.priority + (not attempt.first)]

    def _leave(self, attempt: Attempt) -> None:
        self.needed -= not (attempt.extra or attempt.hedge)
        del self._line(attempt)[attempt.identity]

    def _waits(self) -> Iterator[Attempt]:
        """Return the tasks that wait, in their order."""
        return itertools.chain.from_iterable(line.values() for line in self._lines)

    def take(self, now: float) -> tuple[int, Attempt] | None:
        """Return a worker and the task that it begins now; None if no worker can take any."""
        self.recheck = None
        if not self.waiting:
            return None
        chosen = self._for_fallback() or self._choose(now)
        if chosen is None:
            return None
        index, attempt = chosen
        worker = self.workers[index]
        if self._room(index) is Room.BEHIND:
            attempt.behind = next(each for each, other in worker.running.items() if other.late)
        self.waiting -= 1
        if self._batch > 1 and _shares(attempt):
            self._composing.add(index)
        self.begin(index, attempt, now)
        return index, attempt

    def begin(self, index: int, attempt: Attempt, now: float) -> None:
        """A worker begins a task that waits for none, or no longer."""
        worker = self.workers[index]
        self._turn += 1
        worker.turn = self._turn
        worker.running[attempt.identity] = attempt
        attempt.worker, attempt.started = index, now
        attempt.place = len(worker.running)
        attempt.together = 1 if attempt.behind else min(attempt.place, self._tuning.together)
        attempt.group.assigned(index)
        prompt = None if attempt.query is None or attempt.fallback else attempt.query.prompt
        if prompt is not None:
            if not attempt.uncached:
                self._look_up(attempt)
            attempt.new = self._traffic(attempt, self._computed.uncached(index, prompt))
            self.caches.add(index, prompt)
        self.running += index < self._mains
        self.reorder(index)

    def lose_turn(self, index: int) -> None:
        """A worker has answered unusually: it has its next turn at random (rule 2)."""
        worker, most = self.workers[index], self._tuning.turns * len(self._mains_up)
        worker.turn = self._turn + self._random.uniform(0.0, most)
        self.reorder(index)

    def release(self, now: float, attempt: Attempt) -> bool:
        """A worker is no longer at a task; return whether it was."""
        if attempt.worker is None:
            return False
        worker = self.workers[attempt.worker]
        if worker.running.pop(attempt.identity, None) is None:
            return False
        if attempt.behind and not attempt.late:
            self._judge(attempt.behind in worker.running)
        for other in reversed(worker.running.values()):
            if other.ahead is not None:
                break
            other.ahead = now
        worker.stuck = False
        self.running -= attempt.worker < self._mains
        attempt.group.left(attempt.worker)
        self.reorder(attempt.worker)
        return True

    def lose(self, index: int) -> list[Attempt]:
        """A worker is down; return what it was at."""
        worker = self.workers[index]
        self.up.discard(index)
        self._mains_up.discard(index)
        self._ramps.pop(index, None)
        self._stats.renew(index)
        self.caches.renew(index)
        self._computed.renew(index)
        self.concurrency.renew(index)
        lost, worker.running = list(worker.running.values()), {}
        worker.stuck = False
        if index < self._mains:
            self.running -= len(lost)
        self.reorder(index)
        for attempt in lost:
            attempt.group.left(index)
        return lost

    def restore(self, index: int, now: float) -> float:
        """A worker is up; return until when it may be cold."""
        until = now + self._tuning.ramp
        self.up.add(index)
        if index < self._mains:
            self._mains_up.add(index)
            if self.concurrency.slots(index) > 1:
                self._ramps[index] = Ramp(until)
        self.reorder_all()
        return until

    def ramps(self, index: int) -> bool:
        """Return whether a worker may be cold (rule 8)."""
        return index in self._ramps

    def did(self, index: int, in_time: bool) -> None:
        """A worker that may be cold has done a task, in normal time or not."""
        ramp = self._ramps[index]
        ramp.tasks += in_time
        if ramp.tasks >= self.concurrency.slots(index):
            del self._ramps[index]
        self.reorder_all()

    def end_ramp(self, index: int, now: float) -> None:
        """Give a worker all its tasks if it has been up for long enough."""
        ramp = self._ramps.get(index)
        if ramp is not None and now >= ramp.until:
            del self._ramps[index]
            self.reorder_all()

    def slots(self, index: int) -> int:
        """Return how many tasks a worker gets at a time (rules 2 and 8)."""
        slots, ramps, up = self.concurrency.slots(index), self._ramps, len(self._mains_up)
        if index not in ramps or len(ramps) == up or len(ramps) > self._most_slow:
            return slots
        return min(slots, ramps[index].tasks)

    def reorder(self, index: int) -> None:
        """Put a worker in its place after its load, turn, health or slowness has changed."""
        worker = self.workers[index]
        load, slots = len(worker.running), self.slots(index)
        if index >= self._mains:
            free = index in self.up and load < self._fallback_slots
            self._fallbacks.update(index, (1.0, load, worker.turn) if free else None)
        elif load and self.concurrency.drains(index) and not worker.has_late:
            self._order.update(index, None)
        elif index in self.up and (self._occupied(worker) < slots or self._takes_more(index, load)):
            load += slots * worker.stuck
            self._order.update(index, (self._stats.slowness(index), load, worker.turn))
        else:
            self._order.update(index, None)

    def reorder_all(self) -> None:
        """Put all workers in their places: what they compute at once has changed."""
        for index in range(len(self.workers)):
            self.reorder(index)

    def late(self, attempt: Attempt) -> None:
        """Mark a task as late: others may be behind it."""
        if attempt.behind and not attempt.late:
            self._judge(False)
        attempt.late = True
        if attempt.worker is not None and self.is_running(attempt):
            self.workers[attempt.worker].stuck = True
            self.reorder(attempt.worker)

    def _judge(self, overtook: bool) -> None:
        self._overtook += (overtook - self._overtook) / self._tuning.overtaking_memory

    def _occupied(self, worker: Worker) -> int:
        """Return how many of its slots a worker's tasks take (rule 2)."""
        if worker.stuck or not self.concurrency.is_found:
            return len(worker.running)
        return sum(not attempt.late for attempt in worker.running.values())

    def _room(self, index: int) -> Room:
        worker, found = self.workers[index], self.concurrency
        if not found.is_found or self._occupied(worker) < found.computed(index):
            return Room.FREE
        return Room.BEHIND if worker.stuck else Room.AHEAD

    def is_running(self, attempt: Attempt) -> bool:
        """Return whether a worker is at an attempt; if not, another may be in its place by now."""
        worker = attempt.worker
        return worker is not None and attempt.identity in self.workers[worker].running

    # Rule 6

    def _takes_more(self, index: int, load: int) -> bool:
        if index not in self._composing or self._stats.slowness(index) > 1.0:
            return False
        longest = self._tuning.slow * self._stats.call_time(load + 1)
        return load < self._batch and longest <= self._hang_timeout

    def close_calls(self) -> None:
        """Let the calls begin that were put together."""
        closed, self._composing = self._composing, set()
        for worker in closed:
            self.reorder(worker)

    # Rule 5

    def _for_fallback(self) -> tuple[int, Attempt] | None:
        if not self._apart or (worker := next(iter(self._fallbacks), None)) is None:
            return None
        return worker, self._apart.popitem(last=False)[1]

    # Rules 2 to 4

    def _choose(self, now: float) -> tuple[int, Attempt] | None:
        for worker in self._order:
            room = self._room(worker)
            if room is Room.AHEAD and self.needed < self._tuning.ahead * len(self._mains_up):
                continue
            slowness = self._stats.slowness(worker)
            if slowness > 1.0 and self._few_slow:
                others = self.concurrency.all_computed(self._mains_up - self._stats.slow)
                wait = (slowness - 1.0) * self._stats.normal
                offered = self._offered(now, wait, math.ceil((slowness - 1.0) * others))
            else:
                wait = 0.0
                offered = self._waits()
            attempt = None
            for attempt in offered:
                if room is Room.BEHIND and not (attempt.probes or self._overtook >= 0.5):
                    continue
                if self._may(worker, attempt):
                    if attempt.uncached and now < (
                        until := self._stays_until(now, worker, attempt)
                    ):
                        self.recheck = min(until, self.recheck or until)
                        continue
                    self._leave(attempt)
                    return worker, attempt
            if wait:
                self._look_again(now, wait)
                if attempt is None:
                    return None  # the other workers are slower still
        return None

    # Rule 7

    def cheapest(self, query: Query) -> int:
        """Return the bytes of a prompt that a copy would have to compute, where they are least."""
        assert query.prompt is not None
        others = self._mains_up - {each.worker for each in query.attempts.values()}
        new = (self.caches.uncached(worker, query.prompt) for worker in others)
        return min(new, default=query.prompt.size)

    def _look_up(self, attempt: Attempt) -> None:
        if attempt.query is not None and (prompt := attempt.query.prompt) is not None:
            workers = range(self._mains)
            attempt.uncached = tuple(self.caches.uncached(worker, prompt) for worker in workers)

    def uncache(self, attempt: Attempt) -> None:
        """Undo what an attempt that a worker broke off would have cached there."""
        query, worker = attempt.query, attempt.worker
        if attempt.uncached and query is not None and query.prompt is not None:
            assert worker is not None
            held = query.prompt.size - attempt.uncached[worker]
            self.caches.forget(worker, query.prompt, held)

    def answers(self, attempt: Attempt, is_usual: bool) -> None:
        """A worker has answered, with an error or else with what it computed of a prompt."""
        attempt.answered = True
        query, worker = attempt.query, attempt.worker
        if is_usual and attempt.new is not None and query is not None and query.prompt is not None:
            assert worker is not None
            self._computed.add(worker, query.prompt)

    def _traffic(self, attempt: Attempt, new: int) -> Traffic:
        return Traffic(attempt.traffic.route, size_class(new), is_prompt=True)

    def _shown(self, now: float, worker: int) -> float:
        """Return how many times as long as normal a worker is at a prompt; 1 if not slow."""
        shown = max(
            (
                self._stats.ratio(now - attempt.started, attempt.kind, attempt.new)
                for attempt in self.workers[worker].running.values()
                if attempt.new is not None and attempt.started is not None and not attempt.answered
            ),
            default=1.0,
        )
        return shown if shown >= self._tuning.slow else 1.0

    def _seconds(self, now: float, attempt: Attempt, worker: int) -> float:
        """Return how long a worker would take."""
        new, shown = attempt.uncached[worker], self._shown(now, worker)
        if shown > 1.0 and attempt.query is not None and attempt.query.prompt is not None:
            new = self._computed.uncached(worker, attempt.query.prompt)  # the rest may never be
        slowness = max(shown, self._stats.slowness(worker))
        return self._stats.expected(attempt.traffic.route, new) * slowness

    def _stays_until(self, now: float, worker: int, attempt: Attempt) -> float:
        """Return until when a task waits for workers that would take less time than this one."""
        own = self._seconds(now, attempt, worker)
        others = (each for each in self._mains_up if each != worker and self._may(each, attempt))
        best = min((self._seconds(now, attempt, each) for each in others), default=own)
        return attempt.queued + self._tuning.stays * (own - best)

    def _offered(self, now: float, wait: float, place: int) -> Iterator[Attempt]:
        """Return what a slow worker does not pass by: what has waited long, or is far back."""

        def waited(attempt: Attempt) -> bool:
            return now >= attempt.queued + wait

        back: Iterable[Attempt] = ()
        if self.waiting > place:
            back = itertools.islice(self._waits(), place, None)
        long = (itertools.takewhile(waited, line.values()) for line in self._lines)
        return itertools.chain(*long, back)

    def _look_again(self, now: float, wait: float) -> None:
        for line in self._lines:
            at = next((a.queued + wait for a in line.values() if a.queued + wait > now), None)
            if at is not None and (self.recheck is None or at < self.recheck):
                self.recheck = at

    def _may(self, worker: int, attempt: Attempt) -> bool:
        """Return whether rules 3 and 6 let a worker take a task."""
        at, failed, holders = attempt.group.at, attempt.group.failed, _holders(attempt)
        if worker in holders or (worker in self._composing and not _shares(attempt)):
            return False
        if worker not in at and worker not in failed:
            return True
        sound = self._mains_up - failed - holders
        if sound - at.keys():
            return False
        return worker in sound or not sound


def _shares(attempt: Attempt) -> bool:
    """Return whether a task may be in one call with others."""
    return attempt.query is not None and not attempt.query.losses


def _holders(attempt: Attempt) -> set[int]:
    """Return the workers that have a live attempt at the same query."""
    query = attempt.query
    if query is None or len(query.attempts) < 2:
        return set()
    others = (other.worker for other in query.attempts.values() if other is not attempt)
    return {worker for worker in others if worker is not None}
