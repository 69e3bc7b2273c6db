"""Finds an upstream that fails more of a route's requests than the other upstreams do.

A request that must not be repeated goes to one upstream, so that nobody else's answer says whose
fault an error is. What does say it is a comparison: over the same seconds and on the same route, a
broken request fails wherever it is sent, and a broken upstream fails what others answer. Envoy
calls this outlier detection by success rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import comb

WINDOW = 10.0
"""Seconds that are compared: an upstream that broke must not live on what it answered before."""
CHANCE, AGAIN = 1e-3, 0.1
"""An upstream is an outlier if so many errors fall on it by chance with at most this probability:
six errors of six beside seven answers are enough. One that was ejected just now needs less: one
error of one beside nine answers."""
RATIO = 3.0
"""And if its share of errors is so many times that of the others. With many requests a small
difference is no chance either, but half an upstream is better than none."""
LEAST = 0.2
"""And if it fails this share at least, for the same reason."""
UNKNOWN = 0.1
"""Seconds that a sound answer is taken to take before there was one."""
SMOOTHING = 0.1
"""How far the usual time moves towards each new one."""


@dataclass(slots=True)
class _Tally:
    """What an upstream answered on a route: in this window so far, and in the one before."""

    since: float
    answers: list[int] = field(default_factory=lambda: [0, 0])
    failures: list[int] = field(default_factory=lambda: [0, 0])

    def turn(self, now: float) -> None:
        """Forget what is older than a window; half a window is the step."""
        while now - self.since >= WINDOW / 2:
            if now - self.since >= 1.5 * WINDOW:
                self.since = now
                self.answers, self.failures = [0, 0], [0, 0]
                return
            self.since += WINDOW / 2
            self.answers = [0, self.answers[0]]
            self.failures = [0, self.failures[0]]


def _share(tally: _Tally) -> float:
    return sum(tally.failures) / sum(tally.answers)


class Outliers:
    """Counts answers and errors by route and upstream, and compares one with the better half."""

    def __init__(self) -> None:
        self._routes: dict[str, dict[int, _Tally]] = {}
        self._seconds: dict[str, float] = {}

    def usual_seconds(self, route: str) -> float:
        """Return about how long a sound answer on a route takes."""
        return self._seconds.get(route, UNKNOWN)

    def took(
        self,
        now: float,
        route: str,
        upstream: int,
        seconds: float,
        failed: bool,
        others: set[int],
        again: bool,
    ) -> str | None:
        """Take in an answer; return why its upstream is an outlier, or None if it isn't.

        Args:
            now: the time in seconds.
            route: that the request came on.
            upstream: that answered.
            seconds: that it took.
            failed: whether it answered with an error of its own.
            others: the upstreams that it is compared with: those that get requests.
            again: whether it was ejected, and has answered nothing well since.
        """
        tallies = self._routes.setdefault(route, {})
        own = tallies.setdefault(upstream, _Tally(now))
        own.turn(now)
        own.answers[0] += 1
        own.failures[0] += failed
        if not failed:
            usual = self._seconds.get(route, seconds)
            self._seconds[route] = usual + SMOOTHING * (seconds - usual)
            return None
        compared = [tally for other, tally in tallies.items() if other in others]
        for tally in compared:
            tally.turn(now)
        compared = sorted((each for each in compared if sum(each.answers)), key=_share)
        compared = compared[: (len(compared) + 1) // 2]  # others may be broken as well
        answers, failures = sum(own.answers), sum(own.failures)
        beside = sum(sum(tally.answers) for tally in compared)
        theirs = sum(sum(tally.failures) for tally in compared)
        share, usual = failures / answers, theirs / beside if beside else 1.0
        if share < LEAST or share < RATIO * usual:
            return None
        if tail(failures, answers, theirs, beside) > (AGAIN if again else CHANCE):
            return None
        return f"{failures} of {answers} requests failed here, {theirs} of {beside} elsewhere"

    def forget(self, upstream: int) -> None:
        """Forget an upstream: it was ejected, or another has its place."""
        for tallies in self._routes.values():
            tallies.pop(upstream, None)


def tail(failures: int, answers: int, theirs: int, beside: int) -> float:
    """Return the probability that so many of all errors fall on one upstream by chance.

    Fisher's exact test, one-sided: of `answers + beside` requests, `failures + theirs` failed, and
    `answers` of them were this upstream's.
    """
    total, failed = answers + beside, failures + theirs
    ways = sum(
        comb(answers, each) * comb(beside, failed - each)
        for each in range(failures, min(answers, failed) + 1)
    )
    return ways / comb(total, failed)
