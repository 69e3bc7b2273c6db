"""Which worker takes which task: the rules of `binding`, and what `hedging` says of copies."""

from __future__ import annotations

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
