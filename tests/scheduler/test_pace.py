from __future__ import annotations

import pytest

from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.quantiles import FEWEST, KEPT, RecentQuantiles
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.stats import LATE_FACTOR, MOST_OVERHEAD, RETRY, SLOW, LatencyStats
from codedinvnet.scheduler.timers import FEW, Timers


def steady(workers: int = 3) -> LatencyStats:
    """Return what has seen data tasks of 10 ms alone."""
    pace = LatencyStats(workers)
    for i in range(2 * FEWEST):
        assert pace.took(0.0, i % workers, 0, 0.01) is None
    return pace


def test_nothing_is_known_before_enough_has_come() -> None:
    pace = LatencyStats(1)
    for _ in range(FEWEST - 1):
        pace.took(0.0, 0, 0, 0.01)
        assert (pace.normal, pace.late(0, 0)) == (0.0, None)
    pace.took(0.0, 0, 0, 0.01)
    assert pace.normal == 0.01
    assert pace.late(0, 0) == pytest.approx(LATE_FACTOR * 0.01)


def test_the_quantiles_are_of_the_last_values() -> None:
    recent = RecentQuantiles(0.95, 0.5)
    for i in range(1, 121):
        recent.add(i / 1000)
    assert recent.quantiles == (0.115, 0.061)
    for _ in range(2 * KEPT):
        recent.add(0.001)
    assert recent.quantiles == (0.001, 0.001)
    assert len(recent.values) == KEPT


def test_kinds_are_timed_apart() -> None:
    pace = steady()
    for _ in range(FEWEST):
        pace.took(0.0, 0, 10, 0.05)
    assert pace.normal == 0.01
    assert pace.late(10, 0) == pytest.approx(LATE_FACTOR * 0.05)
    assert pace.took(0.0, 0, 10, 0.05) is None
    assert not pace.slow


def test_a_task_that_began_among_others_is_compared_with_those_that_had_as_many_or_more() -> None:
    pace = LatencyStats(2, slots=4)
    for _ in range(2 * FEWEST):
        pace.took(0.0, 0, 0, 0.01)
        pace.took(0.0, 0, -1, 0.02)
    assert pace.late(-1, 0) == pytest.approx(LATE_FACTOR * 0.02)
    assert pace.late(-2, 0) == pytest.approx(3 * LATE_FACTOR * 0.02)
    for _ in range(2):
        pace.took(0.0, 0, -2, 0.05)
    assert not pace.slow, "it had two others before it"


def test_a_slow_worker_is_found_whose_tasks_alone_begin_alone() -> None:
    pace = LatencyStats(2, slots=4)
    for i in range(10 * FEWEST):
        pace.took(0.0, 0, -1, 0.01)
        if i % 10 == 0:
            pace.took(0.0, 1, 0, 0.03)
    assert pace.slow == {1}


def test_what_a_worker_was_at_when_it_was_found_slow_counts_once() -> None:
    pace = LatencyStats(3, slots=4)
    for i in range(2 * FEWEST):
        pace.took(0.0, i % 3, 0, 0.01)
    pace.took(1.0, 1, 0, 0.05)
    until = pace.took(1.0, 1, 0, 0.05)
    assert until is not None
    for later in (1.01, 1.02, 1.03):
        assert pace.took(later, 1, 0, 0.05) == until
    assert pace.retry(until, 1)
    again = pace.took(until + 0.05, 1, 0, 0.05)
    assert again == pytest.approx(until + 0.05 + 2 * RETRY * 0.05)


def test_one_late_task_shows_nothing_and_two_in_a_row_a_slow_worker() -> None:
    pace = steady()
    assert pace.took(1.0, 1, 0, 0.05) is None
    assert pace.took(1.0, 1, 0, 0.01) is None
    assert pace.took(1.0, 1, 0, 0.05) is None
    assert not pace.slow
    assert pace.took(1.0, 1, 0, 0.03) is not None
    assert pace.slow == {1}
    assert pace.slowness(1) == pytest.approx(3)  # of the better of its last two
    assert pace.late(0, 1) == pytest.approx(3 * LATE_FACTOR * 0.01)
    assert pace.slowness(0) == 1.0
    assert pace.took(1.0, 1, 0, 0.01) is None
    assert not pace.slow


def test_a_slow_worker_is_tried_again_after_ever_longer_times() -> None:
    pace = steady()
    pace.took(0.0, 1, 0, 0.03)
    waits = []
    now = 0.0
    for _ in range(3):
        until = pace.took(now, 1, 0, 0.03)
        assert until is not None
        waits.append(until - now)
        assert not pace.retry((now + until) / 2, 1)
        assert pace.slow == {1}
        assert pace.retry(until, 1)
        assert not pace.slow
        now = until
    assert waits == pytest.approx([RETRY * 0.03 * 2**i for i in range(3)])
    pace.took(now, 1, 0, 0.01)
    pace.took(now, 1, 0, 0.03)
    assert pace.took(now, 1, 0, 0.03) == pytest.approx(now + RETRY * 0.03)


def test_another_worker_in_its_place_is_not_slow() -> None:
    pace = steady()
    pace.took(0.0, 1, 0, 0.03)
    pace.took(0.0, 1, 0, 0.03)
    pace.renew(1)
    assert not pace.slow
    assert pace.took(0.0, 1, 0, 0.03) is None


def test_the_excess_is_what_stragglers_cost() -> None:
    pace = steady()
    for i in range(4000):
        pace.answered(0, 0.05 if i % 10 == 0 else 0.01 * 0.99 * SLOW)
    assert pace.overhead == pytest.approx(0.4, rel=0.05)  # four normal times of every tenth
    for _ in range(4000):
        pace.answered(0, 0.01)
    assert pace.overhead == pytest.approx(0, abs=1e-3)
    for _ in range(4000):
        pace.answered(0, 60.0)
    assert pace.overhead == pytest.approx(MOST_OVERHEAD, rel=0.01)


def test_a_slow_workers_usual_time_is_no_excess() -> None:
    pace = steady()
    pace.took(0.0, 1, 0, 0.05)
    pace.took(0.0, 1, 0, 0.05)
    before = pace.overhead
    pace.answered(1, 0.05)
    assert pace.overhead < before


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


def test_a_timer_of_a_kind_that_nobody_knows_is_not_thrown_away() -> None:
    scheduler = Scheduler(Rules(1, POLICIES["uncoded"]))
    taken = scheduler.submit(0.0, 1, 5.0)
    assert taken is not None
    (query,) = taken[0]
    scheduler.timers.set(1.0, "deadlien", query)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="deadlien"):
        scheduler.next_timer()
    with pytest.raises(AssertionError, match="deadlien"):
        scheduler.on_timer(1.0)
