"""What is late, which workers are slow, and what stragglers cost."""

from __future__ import annotations

import pytest

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
