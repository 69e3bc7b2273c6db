"""How many requests each worker gets at a time, found from when its answers come.

A request that a worker begins while it has others is either computed together with them or waits
until one of them is over. In the first case it takes as long as a request that has the worker to
itself; in the second it takes longer, by the time until the first of the others is over. The share
of that time by which requests were longer is near 0 or near 1, whatever the service times are.

A worker gets one request more than it computes at once. So the next one is there when an answer
leaves, and whether that one is computed together with the others shows if the number should grow.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from codedinvnet.scheduler.group import Traffic

START = 3
"""What a worker is taken to compute at once before anything is known."""
EVIDENCE = 5.0
"""The number changes when requests had others ahead of them for so many service times in all."""
SERIAL = 0.6
"""Requests that were longer by this share of that time were not computed together."""
ALONE = 200
"""Requests for each slot, none of which had its worker to itself, until the next one gets it."""
STEP = 0.1
"""The time of a request alone moves by this share towards each new one: it is near the median."""


@dataclass(slots=True)
class _Found:
    """What is known of a worker."""

    at_once: int = START
    alone: dict[Traffic, float] = field(default_factory=dict)
    """Seconds of a request that has the worker to itself."""
    since: int = 0
    """Requests since the last of these."""
    ahead: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """How long others were ahead, in service times: of requests within the number, and beyond."""
    longer: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """By how much these were longer, and not by more than others were ahead."""

    def took(self, place: int, seconds: float, ahead: float, traffic: Traffic) -> None:
        """Take in a request; see `Concurrency.took`."""
        self.since += 1
        alone = self.alone.get(traffic)
        if place == 1:
            self.since = 0
            if alone is None:
                self.alone[traffic] = seconds
            else:
                self.alone[traffic] = alone * (1.0 + STEP if seconds > alone else 1.0 - STEP)
        elif alone:
            beyond, ahead = place > self.at_once, min(1.0, ahead / alone)
            self.ahead[beyond] += ahead
            self.longer[beyond] += min(ahead, max(0.0, seconds / alone - 1.0))
            if self.ahead[beyond] >= EVIDENCE:
                self._judge(beyond)

    def _judge(self, beyond: bool) -> None:
        """Grow by half if those beyond the number were computed; shrink if those within waited."""
        waited = self.longer[beyond] >= SERIAL * self.ahead[beyond]
        self.ahead[beyond] = self.longer[beyond] = 0.0
        if beyond and not waited:
            self.at_once += (self.at_once + 1) // 2
        elif waited and not beyond:
            self.at_once -= 1


class Concurrency:
    """The number of requests that each worker gets at a time.

    Args:
        workers: how many there are.
        slots: the number; None: it is found for each worker.
    """

    def __init__(self, workers: int, slots: int | None) -> None:
        self._fixed = slots
        self._found = [_Found() for _ in range(workers)] if slots is None else []

    def slots(self, worker: int) -> int:
        """Return how many requests a worker gets at a time."""
        return self._found[worker].at_once + 1 if self._fixed is None else self._fixed

    def total(self, workers: Collection[int]) -> int:
        """Return how many requests these workers get at a time."""
        if self._fixed is not None:
            return self._fixed * len(workers)
        return sum(self.slots(worker) for worker in workers)

    def drains(self, worker: int) -> bool:
        """Tell whether a worker is to have its next request to itself: the last one was long ago.

        While all workers are busy there would be none, and service times could change unnoticed.
        """
        return self._fixed is None and self._found[worker].since >= ALONE * self.slots(worker)

    def renew(self, worker: int) -> None:
        """Forget what is known of a worker: another took its place."""
        if self._fixed is None:
            self._found[worker] = _Found()

    def took(self, worker: int, place: int, seconds: float, ahead: float, traffic: Traffic) -> bool:
        """Take in what a request took; tell whether its worker now gets another number.

        Args:
            worker: that answered it.
            place: how many requests the worker had when it got this one, which is counted.
            seconds: from then to the answer.
            ahead: seconds from then until the first of the others was over, or this one.
            traffic: what it is like.
        """
        if self._fixed is not None:
            return False
        before = self.slots(worker)
        self._found[worker].took(place, seconds, ahead, traffic)
        return self.slots(worker) != before
