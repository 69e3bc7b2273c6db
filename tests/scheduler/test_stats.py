"""What is late, which workers are slow, and what stragglers cost."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.quantiles import RecentQuantiles
from codedinvnet.scheduler.stats import LatencyStats
from codedinvnet.scheduler.timers import FEW, Timers
from codedinvnet.scheduler.tuning import TUNING


class Observed(LatencyStats):
    """Statistics of workers that take one task after the other, of 10 ms each so far."""

    def __init__(self, workers: int = 3, slots: int = 1) -> None:
        super().__init__(workers, slots)
        self.now = 0.0
        for i in range(2 * TUNING.times_needed):
            self.saw(i % workers, 0.01)

    def saw(self, worker: int, *seconds: float, kind: int = 0) -> float | None:
        """Let a worker do tasks; return when it is tried again if it is slow."""
        until = None
        for each in seconds:
            self.now += each
            until = self.took(self.now, worker, kind, each)
        return until


def test_nothing_is_known_before_enough_has_come() -> None:
    stats = LatencyStats(1)
    for _ in range(TUNING.times_needed - 1):
        stats.took(0.0, 0, 0, 0.01)
        assert (stats.normal, stats.late(0, 0)) == (0.0, None)
    stats.took(0.0, 0, 0, 0.01)
    assert stats.normal == 0.01
    assert stats.late(0, 0) == pytest.approx(TUNING.late_factor * 0.01)


def test_the_quantiles_are_of_the_last_values() -> None:
    recent = RecentQuantiles(0.95, 0.5)
    for i in range(1, 121):
        recent.add(i / 1000)
    assert recent.quantiles == (0.115, 0.061)
    for _ in range(2 * TUNING.times_kept):
        recent.add(0.001)
    assert recent.quantiles == (0.001, 0.001)


def test_kinds_are_timed_apart() -> None:
    stats = Observed(slots=4)
    for _ in range(TUNING.times_needed):
        stats.saw(0, 0.05, kind=10)
    assert stats.normal == 0.01
    assert stats.late(10, 0) == pytest.approx(TUNING.late_factor * 0.05)
    assert stats.late(-2, 0) == pytest.approx(3 * TUNING.late_factor * 0.01), (
        "in turn, if not known"
    )
    assert not stats.slow


def test_a_cancelled_task_tells_nothing_in_favour_of_its_worker() -> None:
    stats = Observed()
    for seconds in (0.012, 0.013, 0.012):  # late, and overtaken by their copies
        stats.now += seconds
        stats.took(stats.now, 0, 0, seconds, is_cut=True)
    assert stats.slow == {0}
    assert stats.slowness(0) == TUNING.slow


@pytest.mark.parametrize(
    ("seconds", "slowness"),
    [
        ((0.05, 0.01), 1.0),
        ((0.05, 0.05, 0.01, 0.05), 1.0),
        ((0.05, 0.05), 1.0),
        ((0.05, 0.03, 0.04), 3.0),
        ((0.01 * TUNING.slow,) * 3, TUNING.slow),
        ((0.05, 0.05, 0.05, 0.01), 1.0),
    ],
)
def test_a_worker_is_slow_after_three_slow_tasks_in_a_row(
    seconds: tuple[float, ...], slowness: float
) -> None:
    stats = Observed()
    stats.saw(1, *seconds)
    assert stats.slowness(1) == pytest.approx(slowness)
    assert stats.slow == ({1} if slowness > 1 else set())
    assert stats.late(0, 1) == pytest.approx(slowness * TUNING.late_factor * 0.01)
    stats.renew(1)
    assert not stats.slow, "another took its place"
    assert stats.saw(1, 0.05) is None


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_what_a_worker_had_when_it_was_blocked_is_one_observation(slots: int) -> None:
    """A block delays every task that a worker has, and is over then."""
    stats = Observed(slots=4)
    stats.now = end = 10.0
    for i in range(slots):
        stats.took(end + 0.01 * i, 1, -i, 0.3 + 0.01 * i)
    assert not stats.slow
    stats.took(end + 0.3, 1, 0, 0.25)
    assert not stats.slow
    stats.took(end + 0.6, 1, 0, 0.25)
    assert stats.slow == {1}, "these began after the block"


def test_a_slow_worker_is_tried_again_after_ever_longer_times() -> None:
    stats = Observed()
    stats.saw(1, 0.03, 0.03)
    waits = []
    for _ in range(3):
        until = stats.saw(1, 0.03)
        assert until is not None
        waits.append(until - stats.now)
        assert not stats.retry((stats.now + until) / 2, 1)
        assert stats.retry(until, 1)
        assert not stats.slow
        stats.now = until
    assert waits == pytest.approx([TUNING.retry * 0.03 * 2**i for i in range(3)])
    until = stats.saw(1, 0.01, 0.03, 0.03, 0.03)
    assert until == pytest.approx(stats.now + TUNING.retry * 0.03), "a task in normal time ends it"


def test_the_overhead_is_what_stragglers_cost() -> None:
    stats = Observed()
    for i in range(4000):
        stats.answered(0, 0.05 if i % 10 == 0 else 0.01 * 0.99 * TUNING.slow)
    assert stats.overhead == pytest.approx(0.4, rel=0.05)  # four normal times of every tenth
    for _ in range(4000):
        stats.answered(0, 0.01)
    assert stats.overhead == pytest.approx(0, abs=1e-3)
    for _ in range(4000):
        stats.answered(0, 60.0)
    assert stats.overhead == pytest.approx(TUNING.most_overhead, rel=0.01)
    stats.saw(1, 0.05, 0.05, 0.05)
    before = stats.overhead
    stats.answered(1, 0.05)
    assert stats.overhead < before, "that is usual for a slow worker"


def test_timers_come_in_order_and_dead_ones_not_at_all() -> None:
    dead: set[int] = {1}
    timers = Timers(lambda kind, identity: identity in dead)
    for i in (3, 1, 2):
        timers.set(float(i), "late", i)
    assert timers.next() == 2.0
    assert timers.due(1.9) is None
    assert timers.due(2.0) == ("late", 2)
    assert timers.next() == 3.0
    dead |= set(range(10, 10 + 3 * FEW))
    for i in range(10, 10 + 3 * FEW):
        timers.set(float(i), "late", i)
    assert timers.next() == 3.0
    assert len(timers) == 1
