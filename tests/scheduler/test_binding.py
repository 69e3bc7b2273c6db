"""Which worker takes which task: the rules of `binding`, and what `hedging` says of copies."""

from __future__ import annotations

from typing import Any

import pytest

from codedinvnet.scheduler.actions import Answer, Call, Send
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.model import ErasureCode, Model, only

NORMAL = 0.01
LATE = 1.001 * TUNING.late_factor * NORMAL


def timed(policy: str = "uncoded", workers: int = 3, slow: float = 1.0, **rules: object) -> Model:
    """Return a model that knows data tasks of 10 ms, and worker 0 to take `slow` times as long."""
    code = ErasureCode(2) if policy.startswith("coded") else None
    model = Model(policy, workers, code, **{"hang_timeout": 100.0, "hedge_share": 1.0, **rules})
    pace = model.scheduler.stats
    for _ in range(TUNING.times_needed):
        pace.took(0.0, workers - 1, 0, NORMAL)
    for began in (-3 * slow * NORMAL, -2 * slow * NORMAL, -slow * NORMAL)[: 3 * (slow > 1)]:
        until = pace.took(began + slow * NORMAL, 0, 0, slow * NORMAL)
        if until is not None:
            model.scheduler.timers.set(until, "retry", 0)
    model.scheduler.assigner.reorder(0)
    return model


def sent_to(model: Model) -> list[int]:
    return [send.worker for send in only(model.new(), Send)]


# The line


def test_a_lost_task_is_sent_again_before_those_that_wait() -> None:
    model = Model("uncoded", 2)
    first, _, _, _ = model.submit(4)
    model.new()
    model.fail(*model.data(first))
    assert [send.members for send in only(model.new(), Send)] != [(first,)], "it just failed it"
    model.result(model.running[1])
    assert [send.members for send in only(model.new(), Send)] == [(first,)]


# Slow workers


def test_a_task_that_the_others_finish_sooner_is_not_for_a_slow_worker() -> None:
    model = timed(slow=3)
    model.submit(6)  # two are taken, and four are what the others do while it does one
    assert sent_to(model) == [1, 2]
    (fifth,) = model.submit()
    assert sent_to(model) == [0]
    assert len(model.data(fifth)) == 1, "it takes the one that is as far back, not the first"


def test_a_task_waits_for_faster_workers_no_longer_than_it_can_gain() -> None:
    model = timed(slow=3)
    model.submit(3)  # the others do not come back
    assert sent_to(model) == [1, 2]
    model.wait(2 * NORMAL * 0.99)
    assert sent_to(model) == []
    model.wait(2 * NORMAL * 0.02)
    assert sent_to(model) == [0]


# Copies


def test_a_held_answer_is_late_as_well() -> None:
    model = timed("hedge")
    (query,) = model.submit()
    (attempt,) = model.data(query)
    model.release(attempt)
    model.wait(LATE)
    (copy,) = model.data(query)
    assert model.worker(copy) != model.worker(attempt)


def test_a_copy_that_is_late_is_copied_and_the_next_is_not() -> None:
    model = timed("hedge", workers=5)
    model.submit(3)
    for _ in range(3):
        model.result(*model.running.values())
    (query,) = model.submit()
    for copies in range(1, TUNING.most_copies + 1):
        model.wait(LATE)
        assert len(model.data(query)) == 1 + copies
    model.wait(3 * LATE)
    assert len(model.data(query)) == 1 + TUNING.most_copies
    assert model.scheduler.dispatcher.hedges == TUNING.most_copies


# Extra tasks


# Fallbacks: cheaper workers for late queries


def falling_back(workers: int = 3, **rules: Any) -> Model:
    """Return a model whose last worker is a fallback, and which knows what is late."""
    model = Model("auto", workers, fallbacks=1, **{"hang_timeout": 100.0, **rules})
    for _ in range(TUNING.times_needed):
        model.scheduler.stats.took(0.0, 0, 0, NORMAL)
    return model


def begun(model: Model) -> list[tuple[int, int]]:
    """Return the worker and the query of each task that is new."""
    return [(send.worker, send.members[0]) for send in only(model.new(), Send)]


def test_a_late_query_goes_to_the_fallback_and_is_copied_after_as_long_again() -> None:
    model = falling_back(extra=2.0)
    (query,) = model.submit()
    assert begun(model) == [(0, query)]
    model.wait(LATE)
    assert begun(model) == [(2, query)]
    model.wait(LATE)
    assert begun(model) == [(1, query)]
    (asked,) = (attempt for attempt, worker in model.at.items() if worker == 2)
    model.result(asked)
    assert model.ended[query] == Answer(query, asked, 2)


def test_a_query_that_waits_for_long_goes_to_the_fallback() -> None:
    model = falling_back(2)
    first, second = model.submit(2)
    model.wait(LATE)
    assert begun(model) == [(0, first), (1, first)]
    (asked,) = (attempt for attempt, worker in model.at.items() if worker == 1)
    model.result(asked)
    assert begun(model) == [(1, second)]


def test_what_the_fallback_declines_waits_for_its_own_answer() -> None:
    model = falling_back(2)
    (query,) = model.submit()
    (own,) = model.data(query)
    model.wait(LATE)
    (asked,) = (attempt for attempt, worker in model.at.items() if worker == 1)
    model.fail(asked)
    assert query not in model.ended
    model.result(own)
    assert model.ended[query] == Answer(query, own, 0)


@pytest.mark.parametrize("final", [False, True])
def test_what_is_lost_waits_for_the_fallback_and_is_sent_again_if_that_fails(final: bool) -> None:
    model = falling_back(2)
    (query,) = model.submit()
    model.new()
    model.fail(*model.data(query), final=final)
    assert begun(model) == [(1, query)]
    model.fail(*model.data(query))
    assert begun(model) == [(0, query)]


def test_fallbacks_are_no_others() -> None:
    assert falling_back().scheduler.assigner.slots_up == 2
    with pytest.raises(ValueError, match="0 are too few"):
        Model("auto", 1, fallbacks=1)


@pytest.mark.parametrize("known", [True, False])
def test_the_fallback_is_asked_at_once_where_no_other_worker_is(known: bool) -> None:
    model = Model("auto", 2, fallbacks=1, hang_timeout=100.0)
    if known:
        (query,) = model.submit(1)
        model.new()
        model.kill(0)
    else:
        model.kill(0)
        (query,) = model.submit(1)
    assert begun(model) == [(1, query)]


# Calls of several tasks


def calls_of(model: Model) -> list[list[int]]:
    """Return the queries of each call of several tasks that is new."""
    return [[send.members[0] for send in call.sends] for call in only(model.new(), Call)]


def test_what_waits_is_computed_in_one_call() -> None:
    model = Model("uncoded", 2, worker_batch=3)
    first, second = model.submit(2)
    assert calls_of(model) == []  # each goes to a worker of its own
    waiting = model.submit(5)
    (at,) = model.data(first)
    model.result(at)
    assert calls_of(model) == [waiting[:3]]
    model.result(*model.data(second))
    assert calls_of(model) == [waiting[3:]]
    model.result(model.data(waiting[0])[0])
    (late,) = model.submit()
    assert model.data(late) == []  # the call has begun
    for query in waiting[1:3]:
        model.result(*model.data(query))
    assert model.data(late)


def test_what_was_lost_with_a_call_is_computed_alone() -> None:
    model = Model("uncoded", 1, worker_batch=2)
    queries = model.submit(2)
    assert calls_of(model) == [queries]
    model.kill(0)
    model.up(0)
    assert len(model.at) == 1
    model.drain()
    assert calls_of(model) == []
    assert all(isinstance(model.ended[query], Answer) for query in queries)
