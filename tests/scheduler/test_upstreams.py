"""Hedging in front of servers that queue what they are given: it must help, and never hurt."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from tests.scheduler.upstreams import Cell, Fault, Found, Run


def run(cell: Cell, policy: str = "hedge") -> Found:
    return Run(replace(cell, policy=policy)).run()


@pytest.mark.parametrize(("busy", "slots"), [(0.4, 1), (0.52, 2)])
def test_a_server_that_was_blocked_is_used_again(busy: float, slots: int) -> None:
    """With several slots one block delays several requests; that does not make a server slow."""
    cell = Cell("block", busy, slots=slots)
    hedge, queue = run(cell), run(cell, "queue")
    assert hedge.quantile(0.5) < 1.15 * queue.quantile(0.5)
    assert hedge.quantile(0.9) < 1.15 * queue.quantile(0.9)
    assert hedge.quantile(0.99) < 0.5 * queue.quantile(0.99)
    assert hedge.quantile(0.999) < 0.2 * queue.quantile(0.999)


@pytest.mark.parametrize(("busy", "slots"), [(0.4, 1), (0.7, 2)])
def test_requests_that_are_long_by_themselves_are_not_copied(busy: float, slots: int) -> None:
    cell = Cell("long", busy, slots=slots)
    hedge, uncoded = run(cell), run(cell, "uncoded")
    assert hedge.work <= 1.03
    for share in (0.5, 0.9, 0.99):
        assert hedge.quantile(share) < 1.1 * uncoded.quantile(share)


@pytest.mark.parametrize("busy", [0.2, 0.4])
def test_requests_do_not_wait_behind_long_ones(busy: float) -> None:
    """Nothing says how many requests a server computes at once, nor which ones are long."""
    cell = Cell("long", busy, slots=None, length=20.0)
    hedge, queue = run(cell), run(replace(cell, slots=1), "queue")
    assert hedge.work < 1.03
    for share in (0.5, 0.8, 0.99, 0.999):
        assert hedge.quantile(share) < 1.1 * queue.quantile(share)


def test_copies_of_long_requests_are_paid_for_by_what_they_took() -> None:
    cell = Cell("half-long", 0.5, slots=None)
    hedge, uncoded = run(cell), run(cell, "uncoded")
    assert hedge.work < 1.03
    for share in (0.99, 0.999):
        assert hedge.quantile(share) < 1.1 * uncoded.quantile(share)


def test_answers_that_are_held_back_do_not_take_the_place_of_others() -> None:
    """A server answers what it got behind a request whose answer does not come."""
    cell = Cell("held", 0.6, slots=None)
    hedge, known = run(cell), run(replace(cell, slots=2))
    for share in (0.5, 0.9, 0.99):
        assert hedge.quantile(share) < 1.2 * known.quantile(share)


def test_answers_that_are_held_back_are_copied_where_most_servers_are_busy() -> None:
    slow = {"hedge": 0, "uncoded": 0}
    for policy, seed in product(slow, (4, 5)):
        found = run(Cell("held", 0.9, slots=None, seed=seed), policy)
        slow[policy] += sum(seconds > 0.3 for seconds in found.seconds)
    assert slow["hedge"] < 0.2 * slow["uncoded"]


def test_a_copy_that_wins_says_nothing_about_one_that_is_sent_later() -> None:
    """Copies of what waited at a server win, those of what is long itself do not."""
    cell = Cell("long", 0.4, slots=None, length=20.0)
    hedge, uncoded = run(cell), run(cell, "uncoded")
    assert hedge.work <= 1.05
    assert hedge.quantile(0.999) < 1.1 * uncoded.quantile(0.999)


@pytest.mark.parametrize(("busy", "slots"), [(0.2, 1), (0.4, 2)])
def test_where_all_servers_are_slow_at_once_hedging_does_not_make_it_worse(
    busy: float, slots: int
) -> None:
    cell = Cell("all-slow", busy, slots=slots, seed=2)
    hedge, uncoded = run(cell), run(cell, "uncoded")
    assert hedge.work < 1.02 * uncoded.work
    for share in (0.5, 0.9, 0.99):
        assert hedge.quantile(share) < 1.03 * uncoded.quantile(share)


@pytest.mark.parametrize("fault", ["none", "exponential"])
def test_busy_servers_get_no_extra_work_when_none_is_slow(fault: Fault) -> None:
    cell = Cell(fault, 0.9, slots=2)
    hedge, uncoded = run(cell), run(cell, "uncoded")
    assert hedge.work <= 1.01
    assert hedge.quantile(0.99) < 1.05 * uncoded.quantile(0.99)


def test_a_slow_server_does_not_take_the_others_down() -> None:
    """Three upstreams, one of them 10 times slower, at 90 % of what the two others can do."""
    cell = Cell("slow", 0.6, slots=2, upstreams=3)
    hedge, queue = run(cell), run(cell, "queue")
    assert hedge.work < 1.1
    assert hedge.quantile(0.5) < 40
    assert hedge.quantile(0.99) < 0.6 * queue.quantile(0.99)
    assert hedge.quantile(0.999) < 0.6 * queue.quantile(0.999)


@pytest.mark.parametrize(
    ("fault", "busy", "cores"), [("none", 0.8, 1), ("exponential", 0.8, 2), ("block", 0.4, 4)]
)
def test_the_number_of_slots_is_found(fault: Fault, busy: float, cores: int) -> None:
    """No setting says how many requests a server computes at once."""
    found = run(Cell(fault, busy, slots=None, cores=cores))
    known = run(Cell(fault, busy, slots=cores + 1, cores=cores))
    assert found.work < known.work + 0.01
    for share, factor in ((0.5, 1.1), (0.9, 1.15), (0.99, 1.25)):
        assert found.quantile(share) < factor * known.quantile(share)
