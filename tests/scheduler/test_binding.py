"""Which worker takes which task: the rules of `binding`, and what `hedging` says of copies."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.actions import Answer, Call, Replace, Send
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


def test_a_task_behind_another_is_late_after_twice_the_time() -> None:
    model = timed("hedge", workers=2, slots=2)
    queries = model.submit(4)
    model.wait(0.9 * LATE)
    model.result(*(model.data(query)[0] for query in queries[:2]))
    model.wait(LATE)
    assert [len(model.data(query)) for query in queries[2:]] == [1, 1]
    model.wait(0.2 * LATE)
    assert [len(model.data(query)) for query in queries[2:]] == [2, 2]


def test_a_worker_at_a_late_task_comes_last() -> None:
    model = timed("hedge", workers=3, slots=2)
    stuck, *others = model.submit(3)
    model.result(*model.data(others[0]), *model.data(others[1]))
    model.wait(LATE)  # a copy is sent
    model.result(model.data(stuck)[1])
    sent_to(model)
    model.submit(5)
    assert sent_to(model) == [2, 1, 2, 1, 0]


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


def test_a_slow_worker_is_tried_again_in_time() -> None:
    model = timed(slow=3, workers=2)
    model.wait(0.06)  # RETRY times the 30 ms
    model.submit(2)
    assert sorted(sent_to(model)) == [0, 1]


def test_another_worker_in_the_place_of_a_slow_one_takes_its_share() -> None:
    model = timed(slow=3)
    model.kill(0)
    model.up(0)
    model.submit(3)
    assert sorted(sent_to(model)) == [0, 1, 2]


# Copies


def test_a_copy_waits_first_in_the_line() -> None:
    model = timed("hedge", workers=2)
    slow, quick, _ = model.submit(3)
    model.wait(LATE)
    assert model.scheduler.dispatcher.hedges == 2
    model.new()
    model.result(*model.data(quick))
    assert [send.members for send in only(model.new(), Send)] == [(slow,)]


def test_what_waits_for_a_worker_is_not_copied() -> None:
    model = timed("hedge", workers=1)
    model.submit(2)
    model.wait(LATE)
    assert model.scheduler.dispatcher.hedges == 1


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


def test_a_late_query_without_a_budget_is_looked_at_again() -> None:
    model = timed("hedge", workers=4, hedge_share=0.5)
    (query,) = model.submit()
    model.wait(LATE)
    assert model.scheduler.dispatcher.hedges == 0
    model.submit()
    model.wait(LATE)
    assert model.scheduler.dispatcher.hedges == 1
    assert len(model.data(query)) == 2


# Extra tasks


@pytest.mark.parametrize(("excess", "parities"), [(0.0, 0), (1.0, 1)])
def test_a_parity_yields_where_others_wait_and_nobody_straggles(
    excess: float, parities: int
) -> None:
    model = Model("coded", 3, ErasureCode(2))
    model.scheduler.stats.overhead = excess
    model.submit(2)
    model.submit(2)  # the first has its parity: nothing waited for a worker then
    model.submit()
    model.new()
    model.result(*model.running.values())  # both of the second, and its turn comes
    tasks = [send.task for send in only(model.new(), Send)]
    assert tasks.count(2) == parities


@pytest.mark.parametrize("excess", [0.0, 1.0])
def test_a_query_that_hoped_for_what_yields_is_sent_again(excess: float) -> None:
    model = Model("coded", 3, ErasureCode(2))
    model.scheduler.stats.overhead = excess
    model.kill(1, 2)
    first, _, _, _ = model.submit(4)
    model.fail(*model.data(first))
    assert not model.data(first)


# Workers for a small backup


def backed(**rules: object) -> Model:
    """Return a model of two workers for data tasks, and one for the backup of groups of three."""
    return Model("coded", 3, ErasureCode(3, backup=True), **rules)


def test_one_late_query_alone_is_the_backups() -> None:
    model = backed(group_timeout=0.02)
    model.submit(1)
    model.new()
    model.wait(0.03)
    assert [(send.worker, send.task) for send in only(model.new(), Send)] == [(2, 3)]


def test_a_backup_does_not_yield_to_those_who_wait_for_others() -> None:
    model = backed()
    model.scheduler.stats.overhead = 0.0
    model.submit(9)
    assert [send.worker for send in only(model.new(), Send)].count(2) == 1


def test_a_backup_asks_for_no_more_workers_than_there_are_backups() -> None:
    assert backed().scheduler.assigner.slots_up == 2
    with pytest.raises(ValueError, match="1 are too few"):
        Model("coded", 1, ErasureCode(3, backup=True))


@pytest.mark.parametrize("slow", [False, True])
def test_auto_asks_a_backup_for_those_who_wait_for_its_others(slow: bool) -> None:
    code = ErasureCode(3, backup=True)
    model = Model("auto", 2, code, hang_timeout=100.0)
    pace = model.scheduler.stats
    for _ in range(TUNING.times_needed):
        pace.took(0.0, 0, 0, NORMAL)
        pace.took(0.0, 1, 1, NORMAL / 10)
    for i in range(3 * slow):
        pace.took(NORMAL * (i + 1), 1, 1, NORMAL)
    assert (pace.slowness(1) > 1) == slow
    first, second = model.submit(2)
    assert [send.members for send in only(model.new(), Send)] == [(first,)]
    model.wait(LATE)
    assert [(send.worker, send.task) for send in only(model.new(), Send)] == [(1, 3)]
    model.result(next(attempt for attempt, worker in model.at.items() if worker == 1))
    assert [send.members for send in only(model.new(), Send)] == [(second,)]


def test_a_late_task_stays_late_when_it_would_have_waited_for_long() -> None:
    """Tasks became much faster since it came; its query gets a copy as well as a slow rescue."""
    code = ErasureCode(3, backup=True)
    model = Model("auto", 3, code, hang_timeout=100.0, extra=2.0)
    pace = model.scheduler.stats
    for _ in range(TUNING.times_needed):
        pace.took(0.0, 0, 0, 10 * NORMAL)
    waits = pace.late(0, None)
    *others, query = model.submit(3)
    for _ in range(TUNING.times_kept):
        pace.took(0.0, 0, 0, NORMAL)
    late = pace.late(0, None)
    assert waits is not None
    assert late is not None
    model.wait(waits - 1.5 * late)
    for other in others:
        model.result(*model.data(other))
    model.new()
    model.wait(1.1 * late)
    assert [(send.worker, send.members) for send in only(model.new(), Send)] == [(2, (query,))]
    model.wait(late)  # meanwhile it would have waited for too long
    assert [(send.group_size, send.members) for send in only(model.new(), Send)] == [(0, (query,))]


@pytest.mark.parametrize("known", [True, False])
def test_auto_asks_a_backup_at_once_where_no_other_worker_is(known: bool) -> None:
    model = Model("auto", 2, ErasureCode(3, backup=True), hang_timeout=100.0)
    if known:
        (query,) = model.submit(1)
        model.new()
        model.kill(0)
    else:
        model.kill(0)
        (query,) = model.submit(1)
    sent = only(model.new(), Send)
    assert [(send.worker, send.members) for send in sent] == [(1, (query,))]


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


def test_idle_workers_come_before_calls() -> None:
    model = Model("uncoded", 3, worker_batch=2)
    a, b, c, d, *rest = model.submit(8)
    assert calls_of(model) == [[a, d], [b, rest[0]], [c, rest[1]]]


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


def test_a_call_of_which_all_yielded_keeps_nothing_away_from_its_worker() -> None:
    model = Model("uncoded", 3, worker_batch=2)
    model.scheduler.stats.overhead = 0.0
    first, second = model.submit(2)
    assert model.change("replicate")
    model.submit(1)  # whose copy waits
    model.fail(*model.data(first))  # its worker, which may not have it again, takes the copy
    assert model.scheduler.waiting == 1, "the copy yields to what was lost"
    model.new()
    model.fail(*model.data(second))
    assert [send.members for send in only(model.new(), Send)] == [(first,), (second,)]


def test_a_call_is_late_by_its_size() -> None:
    model = timed("hedge", 2, worker_batch=2)
    a, b = model.submit(2)
    c, d, e = model.submit(3)
    for query in (a, b):
        model.result(*model.data(query))
    (call,) = calls_of(model)
    model.wait(LATE)
    assert [len(model.data(query)) for query in call] == [1, 1]
    single = ({c, d, e} - set(call)).pop()
    model.result(*model.data(single))
    model.wait(LATE)
    assert [len(model.data(query)) for query in call] == [2, 2]


def test_no_call_is_so_long_that_its_worker_would_soon_count_as_hung() -> None:
    model = timed("uncoded", 1, worker_batch=8, hang_timeout=0.1)
    queries = model.submit(16)
    assert calls_of(model) == [queries[:5]]  # of 10 ms each, if none is saved by the call
    model.wait(0.09)
    assert not only(model.new(), Replace)
    model.result(*list(model.at))
    model.new()
    for _ in range(TUNING.times_needed):
        model.scheduler.stats.took(0.0, 0, -4, 0.03)  # five take so long
    model.result(*list(model.at))
    assert calls_of(model) == [queries[10:]]


def test_a_slow_worker_gets_one_task_a_call() -> None:
    model = timed("uncoded", 2, slow=3.0, worker_batch=4)
    model.submit(8)
    assert list(model.at.values()).count(0) == 1
    assert list(model.at.values()).count(1) == 4


def test_calls_go_with_one_slot() -> None:
    with pytest.raises(ValueError, match="worker_batch"):
        Model("uncoded", 2, worker_batch=2, slots=2)
