"""How many requests each worker gets at a time, found from when its answers come.

A request that a worker begins while it has others is either computed together with them or waits
until one of them is over. In the first case it takes as long as a request that has the worker to
itself; in the second it takes longer, by the time until the first of the others is over. The share
of that time by which requests were longer is near 0 or near 1, whatever the service times are.

Where many wait, a worker gets one request more than it computes at once (`TaskAssigner`, rule 2).
So the next one is there when an answer leaves, and whether it is computed together with the others
shows if the number should grow. One that is over before all others was computed with them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from codedinvnet.scheduler.group import Traffic
from codedinvnet.scheduler.tuning import TUNING, Tuning


@dataclass(slots=True)
class _Found:
    """What is known of a worker."""

    at_once: int | None = None
    """What it computes at once; None: as many as the worker whose number changed last."""
    alone: dict[Traffic, float] = field(default_factory=dict)
    """Seconds of a request that has the worker to itself."""
    since: int = 0
    """Requests since the last of these."""
    ahead: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """How long others were ahead, in service times: of requests within the number, and beyond."""
    longer: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """By how much these were longer, and not by more than others were ahead."""

    def took(
        self,
        at_once: int,
        place: int,
        seconds: float,
        ahead: float,
        traffic: Traffic,
        tuning: Tuning,
    ) -> int:
        """Learn from a request; return the new number. See `Concurrency.took`."""
        self.since += 1
        step = tuning.alone_step
        alone = self.alone.get(traffic)
        if place == 1:
            self.since = 0
            if alone is None:
                self.alone[traffic] = seconds
            else:
                self.alone[traffic] = alone * (1.0 + step if seconds > alone else 1.0 - step)
        elif place > at_once and seconds <= ahead:
            return place
        elif alone:
            beyond, ahead = place > at_once, min(1.0, ahead / alone)
            self.ahead[beyond] += ahead
            self.longer[beyond] += min(ahead, max(0.0, seconds / alone - 1.0))
            needed = tuning.grow_evidence if beyond else tuning.shrink_evidence
            if self.ahead[beyond] >= needed:
                return self._judge(at_once, beyond, tuning)
        return at_once

    def _judge(self, at_once: int, beyond: bool, tuning: Tuning) -> int:
        """Grow by half if those beyond the number were computed; shrink if those within waited."""
        waited = self.longer[beyond] >= tuning.serial * self.ahead[beyond]
        self.ahead[beyond] = self.longer[beyond] = 0.0
        if waited == beyond:
            return at_once
        return at_once - 1 if waited else at_once + (at_once + 1) // 2


class Concurrency:
    """The number of requests that each worker gets at a time.

    Args:
        workers: how many there are.
        slots: the number; None: it is found for each worker.
    """

    def __init__(self, workers: int, slots: int | None, tuning: Tuning = TUNING) -> None:
        self._fixed, self._tuning = slots, tuning
        self._latest = tuning.first_slots
        self._found = [_Found() for _ in range(workers)] if slots is None else []

    @property
    def is_found(self) -> bool:
        """Whether the number is found, not fixed."""
        return self._fixed is None

    def slots(self, worker: int) -> int:
        """Return how many requests a worker gets at a time, at most."""
        return self.computed(worker) + self.is_found

    def computed(self, worker: int) -> int:
        """Return how many requests a worker computes at once, as far as is known."""
        if self._fixed is not None:
            return self._fixed
        return self._found[worker].at_once or self._latest

    def all_computed(self, workers: Collection[int]) -> int:
        """Return how many requests these workers compute at once."""
        return sum(self.computed(worker) for worker in workers)

    def total(self, workers: Collection[int]) -> int:
        """Return how many requests these workers get at a time."""
        return self.all_computed(workers) + self.is_found * len(workers)

    def drains(self, worker: int) -> bool:
        """Return whether a worker is to have its next request to itself: the last one was long ago.

        While all workers are busy there would be none, and service times could change unnoticed.
        """
        if self._fixed is not None:
            return False
        return self._found[worker].since >= self._tuning.alone_after * self.slots(worker)

    def renew(self, worker: int) -> None:
        """Forget what is known of a worker: another took its place."""
        if self._fixed is None:
            self._found[worker] = _Found()

    def took(self, worker: int, place: int, seconds: float, ahead: float, traffic: Traffic) -> bool:
        """Learn from what a request took; return whether workers now get another number.

        Args:
            worker: that answered it.
            place: how many requests the worker had when it got this one, which is counted.
            seconds: from then to the answer.
            ahead: seconds from then until the first of the others was over, or this one.
            traffic: what it is like.
        """
        if self._fixed is not None:
            return False
        found, before = self._found[worker], self.computed(worker)
        now = found.took(before, place, seconds, ahead, traffic, self._tuning)
        if now != before:
            found.at_once = self._latest = now
        return now != before
