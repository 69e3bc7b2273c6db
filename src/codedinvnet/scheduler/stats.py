"""How long tasks normally run, and which workers are slower.

1. Tasks are timed by kind: data tasks by how many are in their call, every other task by the size
   of its group. Before times are known of calls of n tasks, n times those of one are. A worker with
   several slots may compute them in turn. There a data task that began as one of n is compared with
   those that began as one of n or more. Queries of another *size class* are timed apart. Before
   times of a class are known, those of the next larger one are used. What is larger than all that
   are known is never late.
2. What is *normal* for a kind is the upper quartile of its recent running times, on all workers. A
   task is *late* that has run longer than nearly all of them, or `latest` times as long as normal:
   where many straggle, nearly all is too many.
   Of prompts, what is normal is a line through the times of all sizes (`Pace`), and they are timed
   as multiples of it.
3. A worker is slow if each of its last three tasks took `slow` times as long as normal or more: the
   smallest ratio says how slow. Two may be long by themselves; what a worker was at together is one
   observation: a block delays all of it, and says nothing about what comes next.
   A late task that was cancelled when its copy answered counts as `slow` times as long at least.
4. The *overhead* is what stragglers cost: how much longer than normal answers of data tasks took,
   in normal times a task. It is an average over about `overhead_memory` answers, in which those
   count that took `slow` times as long or longer. What is normal for a slow worker is as much
   longer. Where sizes differ, a normal time in general is the average over as many data tasks.
5. A slow worker is tried again, as if it were not slow, after `retry` times as long as its last
   task took. Each further slow task doubles that time; a task in normal time ends it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from codedinvnet.scheduler.group import ALIKE, Traffic
from codedinvnet.scheduler.pace import Pace, bytes_of
from codedinvnet.scheduler.quantiles import RecentQuantiles
from codedinvnet.scheduler.tuning import TUNING, Tuning


@dataclass(slots=True)
class _Seen:
    """What is known of a worker."""

    ratio: float = 1.0
    """How many times as long as normal its last task took."""
    earlier: float = 1.0
    """And the one before that."""
    slowness: float = 1.0
    until: float = 0.0
    """When it is tried again."""
    strikes: int = 0
    found: float = -1e9
    """When a slow task last ended; slow ones that began before are of the same observation."""


class LatencyStats:
    """Running times.

    Args:
        workers: how many there are.
        slots: how many tasks each may be at.
    """

    def __init__(self, workers: int, slots: int | None = 1, tuning: Tuning = TUNING) -> None:
        self._slots, self._tuning = slots, tuning
        self._kinds: dict[tuple[Traffic, int], RecentQuantiles] = {}
        """By traffic and kind."""
        self._paces = defaultdict[str, Pace](partial(Pace, tuning))
        """Of prompts, by route."""
        self._traffics: dict[Traffic, int] = {}
        """Those of data tasks, and how many there were of each."""
        self._mean = 0.0
        """What is normal for a data task, on average."""
        self._tasks = 0
        self._workers = [_Seen() for _ in range(workers)]
        self.slow: set[int] = set()
        self.overhead = tuning.first_overhead
        self.mean = 1.0

    def took(
        self,
        now: float,
        worker: int,
        kind: int,
        seconds: float,
        traffic: Traffic = ALIKE,
        is_cut: bool = False,
    ) -> float | None:
        """Record a running time; return when the worker is to be tried again if it is slow.

        Args:
            now: the time.
            worker: that ran the task.
            kind: of the task.
            seconds: for which it ran.
            traffic: of its query.
            is_cut: whether it was late and then cancelled, so that nobody knows its whole time.
        """
        seen, tuning = self._workers[worker], self._tuning
        ratio = self.ratio(seconds, kind, traffic)
        if is_cut:
            ratio = max(tuning.slow, ratio)
        if traffic.is_prompt and not is_cut:
            self._paces[traffic.route].took(traffic.size_class, seconds)
        timed, unit = _timed(traffic), self.unit(traffic)
        for each in range(kind, 1) if kind < 0 and self._slots != 1 else (kind,):
            times = self._kinds.get((timed, each))
            if times is None:
                times = self._kinds[timed, each] = RecentQuantiles(
                    tuning.normal, tuning.late, tuning=tuning
                )
            times.add(seconds / unit)
        if kind <= 0:
            work = min(ratio, tuning.most_overhead) * self.price(traffic)
            self.mean += (work - self.mean) / tuning.overhead_memory
            self._traffics[traffic] = self._traffics.get(traffic, 0) + 1
            self._tasks += 1
            own = self._kinds.get((timed, 0))
            usual = own.quantiles[0] * unit if own is not None and own.quantiles else seconds
            self._mean += (usual - self._mean) / min(self._tasks, tuning.overhead_memory)
        if ratio >= tuning.slow:
            if now - seconds < seen.found - tuning.equal_times:
                return seen.until if worker in self.slow else None  # seen before
            seen.found = now
        slowness = min(seen.earlier, seen.ratio, ratio)
        seen.earlier, seen.ratio = seen.ratio, ratio
        if slowness < tuning.slow:
            if ratio < tuning.slow:
                seen.strikes = 0
            self.forgive(worker)
            return None
        seen.slowness = slowness
        seen.until = now + tuning.retry * seconds * 2**seen.strikes
        seen.strikes = min(seen.strikes + 1, tuning.most_strikes)
        self.slow.add(worker)
        return seen.until

    def usual_traffics(self) -> Iterable[Traffic]:
        """Return for each route the traffic that most of its data tasks were of."""
        usual: dict[str, Traffic] = {}
        for traffic, count in self._traffics.items():
            before = usual.get(traffic.route)
            if before is None or count > self._traffics[before]:
                usual[traffic.route] = traffic
        return usual.values()

    def ratio(self, seconds: float, kind: int, traffic: Traffic = ALIKE) -> float:
        """Return how many times as long as its kind normally does a task took; 1 if unknown."""
        known = self._known(kind, traffic)
        return seconds / known[0] if known and known[0] > 0 else 1.0

    def answered(
        self, worker: int, seconds: float, kind: int = 0, traffic: Traffic = ALIKE
    ) -> None:
        """Record how long after its beginning a data task's answer was here."""
        known = self._known(kind, traffic)
        if known and (normal := known[0] * self.slowness(worker)) > 0:
            ratio = seconds / normal
            most, slow = self._tuning.most_overhead, self._tuning.slow
            overhead = min(ratio - 1.0, most) if ratio >= slow else 0.0
            self.overhead += (overhead - self.overhead) / self._tuning.overhead_memory

    def retry(self, now: float, worker: int) -> bool:
        """Let a slow worker be tried again if its time has come; return whether it has."""
        if worker not in self.slow or now < self._workers[worker].until:
            return False
        self.forgive(worker)
        return True

    def forgive(self, worker: int) -> None:
        """Treat a worker as one that is not slow."""
        self._workers[worker].slowness = 1.0
        self.slow.discard(worker)

    def renew(self, worker: int) -> None:
        """Forget what is known of a worker: another took its place."""
        self._workers[worker] = _Seen()
        self.slow.discard(worker)

    def slowness(self, worker: int) -> float:
        """Return how many times as long as normal a worker takes; 1 unless it is slow."""
        return self._workers[worker].slowness

    @property
    def normal(self) -> float:
        """The seconds that a data task normally runs; 0 before that is known."""
        if len(self._traffics) != 1:
            return self._mean
        (traffic,) = self._traffics
        if traffic.is_prompt:
            return self._mean
        times = self._kinds.get((traffic, 0))
        return times.quantiles[0] if times is not None and times.quantiles else 0.0

    def price(self, traffic: Traffic) -> float:
        """Return what a data task of a class normally takes, in data tasks of all classes."""
        known = self._known(0, traffic) if len(self._traffics) > 1 or traffic.is_prompt else ()
        return known[0] / self._mean if known and self._mean > 0 else 1.0

    def unit(self, traffic: Traffic) -> float:
        """Return the seconds that times of a traffic are multiples of."""
        if not traffic.is_prompt:
            return 1.0
        return self._paces[traffic.route].seconds(bytes_of(traffic.size_class))

    def expected(self, route: str, size: int) -> float:
        """Return the seconds until the first token of a prompt of which so much is new."""
        return self._paces[route].seconds(size)

    def cost(self, kind: int, traffic: Traffic = ALIKE) -> float | None:
        """Return what a kind of task normally takes, in data tasks; None before that is known."""
        known = self._known(kind, traffic)
        return known[0] / self.normal if known and self.normal else None

    def call_time(self, tasks: int) -> float:
        """Return the seconds that a call of so many data tasks normally takes, or less.

        Known calls of fewer tasks take as many times as long at most, and those of more no less. It
        is 0 before any are known.
        """
        known = (
            times.quantiles[0] * max(1.0, tasks / (1 - kind))
            for (_, kind), times in self._kinds.items()
            if kind <= 0 and times.quantiles
        )
        return min(known, default=0.0)

    def late(self, kind: int, worker: int | None, traffic: Traffic = ALIKE) -> float | None:
        """Return the seconds after which a worker's task is late; None before that is known.

        Without a worker it is what it would be on one that is not slow.
        """
        if not (known := self._known(kind, traffic)):
            return None
        normal, most = known
        slowness = 1.0 if worker is None else self.slowness(worker)
        return min(self._tuning.late_factor * most, self._tuning.latest * normal) * slowness

    def _known(self, kind: int, traffic: Traffic) -> tuple[float, ...]:
        """Return what is normal for a kind, and what nearly all do not exceed; empty if unknown."""
        times = self._kinds.get((_timed(traffic), kind))
        if times is not None and times.quantiles:
            if not traffic.is_prompt:
                return times.quantiles
            unit = self.unit(traffic)
            return tuple(unit * each for each in times.quantiles)
        if kind < 0:
            return tuple((1 - kind) * each for each in self._known(0, traffic))
        larger = {
            other: times.quantiles
            for (other, each), times in self._kinds.items()
            if each == kind
            and not (other.is_prompt or traffic.is_prompt)
            and other.route == traffic.route
            and other > traffic
        }
        return larger[min(known)] if (known := [t for t in larger if larger[t]]) else ()


def _timed(traffic: Traffic) -> Traffic:
    """Return what a traffic is timed with: prompts of a route together, see `Pace`."""
    return Traffic(traffic.route, is_prompt=True) if traffic.is_prompt else traffic
