"""What copies of late requests save and what they cost, proved by requests that get none.

Of the late requests that would be copied, a few are held out by lot (`Rules.hold_out`). Requests
that were not to be copied take the same time with copies and without. Of the others, those held out
are a random sample of what they would take without. So the times without copies are those of the
first, each counted once, and those of the held-out, each counted (copied + held out) / (held out)
times. This neglects what copies do to *other* requests: they make them wait, and a gateway without
copies would learn less of which upstream stands still.

Times are counted in buckets, in batches of requests that came one after another. An interval is of
how many requests take longer than some time: a sum of weighted counts, for which Fay and Feuer
(1997) give limits. Faults hit many requests at once, so the sum's variance is that between batches
if this is the larger one. Before any request is held out, all that were copied may be slower.

Where one held-out request stands for more of them than may be slower than a quantile, nothing is
known of its upper end, and it has none: with 1 % held out, that of p99.9 takes 370,000 requests,
that of p99 37,000. Its lower end is known sooner. Hence the window adapts and not the share: more
requests that wait in the beginning would cost the tail, and not save much of that time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from codedinvnet.gateway.metrics import FINE, SHORTEST, bucket_of

SHARES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
"""Of the requests, that take no longer than a quantile."""
MOST, FEWEST = 32, 8
"""Batches that are kept, at most, and that an interval needs."""
FIRST_LENGTH, LONGEST, WINDOW = 1.0, 86_400.0 / MOST, 300.0
"""Seconds of a batch in the beginning and at most, and that all together last at least."""
ENOUGH = 400_000
"""Requests from which on the window grows no further."""
NORMAL = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""


class Arm(IntEnum):
    """What became of a request that was late."""

    NEITHER = 0
    """It was not, or was not to be copied."""
    COPIED = 1
    HELD_OUT = 2


class Quantile(NamedTuple):
    """Seconds that a share of the requests don't exceed, with the ends of a 95 % interval."""

    value: float | None
    """None: not enough requests yet."""
    low: float | None
    high: float | None
    """None: not known."""

    def __str__(self) -> str:
        value, low, high = (None if each is None else f"{1000 * each:.4g}" for each in self)
        if value is not None:
            return f"{value} ms ({low} to {high})"
        return "not enough requests yet" if low is None else f"at least {low} ms"


UNKNOWN = Quantile(None, None, None)
STALE = 10.0
"""Seconds for which a report is shown again: making one takes 1 ms."""


class Report(NamedTuple):
    """What a route shows."""

    requests: int
    copied: int
    held_out: int
    window_seconds: float
    """Since the first of them."""
    attempts_share: float
    """The share of the requests to upstreams that were copies."""
    copy_seconds: float
    """The seconds that upstreams spent on these."""
    seconds_share: float
    """Their share of all such seconds."""
    copies: Mapping[str, Quantile]
    """The quantiles as they are."""
    without: Mapping[str, Quantile]
    """As they would be without copies."""

    def told(self) -> dict[str, Any]:
        """Return it as JSON has it, with a text for each quantile."""
        both = {"copies": self.copies, "without": self.without}
        texts = {name: {n: str(each) for n, each in found.items()} for name, found in both.items()}
        return {**self._asdict(), "texts": texts}


class Batch:
    """Requests that came one after another."""

    __slots__ = ("attempts", "began", "seconds", "times")

    def __init__(self, began: float) -> None:
        self.began = began
        self.times: tuple[dict[int, int], ...] = ({}, {}, {})
        """How many requests of each `Arm` ended in each bucket."""
        self.attempts, self.seconds = [0, 0], [0.0, 0.0]
        """Of requests' own attempts, and of copies."""

    def add(self, seconds: float, arm: Arm) -> None:
        """Take in how long a request waited for its answer, or in vain."""
        times, bucket = self.times[arm], bucket_of(seconds)
        times[bucket] = times.get(bucket, 0) + 1

    def join(self, later: Batch) -> None:
        """Take in the batch that came next."""
        for mine, other in zip(self.times, later.times, strict=True):
            for bucket, count in other.items():
                mine[bucket] = mine.get(bucket, 0) + count
        for is_copy in (0, 1):
            self.attempts[is_copy] += later.attempts[is_copy]
            self.seconds[is_copy] += later.seconds[is_copy]

    def count(self) -> int:
        return sum(sum(times.values()) for times in self.times)


class Proof:
    """Keeps what the last requests of a route took. Times are `time.monotonic()`'s."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._length = FIRST_LENGTH
        self._report: Report | None = None
        self._reported = 0.0

    def add(self, now: float, seconds: float, arm: Arm) -> None:
        """Take in how long a request waited for its answer, or in vain."""
        self._batch(now).add(seconds, arm)

    def worked(self, now: float, seconds: float, is_copy: bool) -> None:
        """Take in how long an upstream was at an attempt."""
        batch = self._batch(now)
        batch.attempts[is_copy] += 1
        batch.seconds[is_copy] += seconds

    def _batch(self, now: float) -> Batch:
        batches = self._batches
        if not batches or now - batches[-1].began >= self._length:
            self._make_room(now)
            batches.append(Batch(now))
        return batches[-1]

    def _make_room(self, now: float) -> None:
        """Forget the oldest batch if there are enough; join pairs if they hold too little."""
        batches = self._batches
        if len(batches) < MOST:
            return
        shortest, window = WINDOW / MOST, now - batches[0].began
        counts = [batch.count() for batch in batches]
        if (sum(counts) < ENOUGH or window < WINDOW) and self._length < LONGEST:
            for batch, later in zip(batches[::2], batches[1::2], strict=True):
                batch.join(later)
            del batches[1::2]
            self._length *= 2
            return
        del batches[0]
        if counts[-1] * MOST > 4 * ENOUGH and self._length >= 2 * shortest:
            self._length /= 2

    def report(self, now: float) -> Report | None:
        """Return what the requests show, or showed a moment ago; None without any."""
        if self._report is None or now - self._reported >= min(STALE, self._length):
            self._report, self._reported = self._made(now), now
        return self._report

    def _made(self, now: float) -> Report | None:
        batches = self._batches
        arms = by_arm(batches)
        if not sum(arms):
            return None
        _, copied, held_out = arms
        own, copies = (sum(batch.attempts[i] for batch in batches) for i in (0, 1))
        seconds, work = (sum(batch.seconds[i] for batch in batches) for i in (0, 1))
        return Report(
            sum(arms),
            copied,
            held_out,
            now - batches[0].began,
            copies / max(1, own + copies),
            work,
            work / max(1e-9, seconds + work),
            quantiles(batches, (1.0, 1.0, 1.0), 1.0),
            without_copies(batches),
        )


def by_arm(batches: Sequence[Batch]) -> list[int]:
    """Return how many requests of each `Arm` there are."""
    return [sum(sum(batch.times[arm].values()) for batch in batches) for arm in Arm]


def without_copies(batches: Sequence[Batch]) -> dict[str, Quantile]:
    """Return the quantiles of requests' times as they would be without copies."""
    _, copied, held_out = by_arm(batches)
    each = (copied + held_out) / max(1, held_out)
    """So many one that is held out stands for."""
    weights = (1.0, 0.0, each) if held_out else (1.0, 1.0, 0.0)
    return quantiles(batches, weights, max(1.0, each))


def quantiles(
    batches: Sequence[Batch], weights: Sequence[float], heaviest: float
) -> dict[str, Quantile]:
    """Return the quantiles of times that count by the weights of their arms.

    The heaviest weight is that of a time that nobody has seen.

    From the longest time downwards, `slower` is how many requests took longer. Where its limits
    pass what a quantile allows, that quantile's interval begins or ends.
    """
    number = len(batches)
    if number < FEWEST:
        return dict.fromkeys(SHARES, UNKNOWN)
    counted = defaultdict[int, list[tuple[int, float, int]]](list)
    for index, batch in enumerate(batches):
        for times, weight in zip(batch.times, weights, strict=True):
            if weight:
                for bucket, count in times.items():
                    counted[bucket].append((index, weight, count))
    sizes = [batch.count() for batch in batches]
    total, squares = sum(sizes), sum(size * size for size in sizes)
    allowed = {name: (1.0 - share) * total for name, share in SHARES.items()}
    own = [0.0] * number
    slower = alone = own_squares = products = 0.0
    _, most = limits(slower, alone, heaviest)
    low, value, high = dict[str, float](), dict[str, float](), dict[str, float]()
    for bucket in sorted(counted, reverse=True):
        bound = SHORTEST * FINE**bucket
        value |= {name: bound for name, may in allowed.items() if slower <= may}
        high |= {name: bound for name, may in allowed.items() if most <= may}
        for index, weight, count in counted[bucket]:
            more = weight * count
            slower += more
            alone += weight * more
            own_squares += more * (2 * own[index] + more)
            products += more * sizes[index]
            own[index] += more
        share = slower / total
        between = own_squares - 2 * share * products + share * share * squares
        least, most = limits(slower, max(alone, between * number / (number - 3)), heaviest)
        for name, may in allowed.items():
            if least > may:
                low.setdefault(name, bound / FINE)
    return {
        name: Quantile(value[name] if name in high else None, low.get(name), high.get(name))
        for name in SHARES
    }


def limits(total: float, variance: float, heaviest: float) -> tuple[float, float]:
    """Return 95 % limits of the mean of a sum of weighted counts (Fay and Feuer, 1997)."""
    if not total:
        return 0.0, heaviest / 2 * chi_squared(2.0, NORMAL)
    heaviest = max(heaviest, variance / total)
    least = variance / (2 * total) * chi_squared(2 * total**2 / variance, -NORMAL)
    total, variance = total + heaviest, variance + heaviest**2
    return least, variance / (2 * total) * chi_squared(2 * total**2 / variance, NORMAL)


def chi_squared(freedom: float, deviations: float) -> float:
    """Return a quantile of the chi-squared distribution, as Wilson and Hilferty (1931) do."""
    spread = 2 / (9 * freedom)
    return freedom * max(0.0, 1 - spread + deviations * math.sqrt(spread)) ** 3
