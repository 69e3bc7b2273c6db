"""Tasks and workers that are lost, and the deadline."""

from __future__ import annotations

from codedinvnet.scheduler.actions import DEADLINE, Answer, AnswerDecoded, Fail, Replace, Send
from codedinvnet.scheduler.completion import EXTRA_RETRIES
from tests.scheduler.model import FINAL, ErasureCode, Model, only
from tests.scheduler.situations import coded

# Losses


def test_a_lost_workers_tasks_go_to_another() -> None:
    model = Model("uncoded", 2)
    queries = model.submit(6)
    lost = model.running[0]
    model.kill(0)
    assert model.new()[-1] == Replace(0, "killed")
    assert model.loads == [0, 1]
    for _ in queries:
        model.result(*model.running.values())
    assert set(model.ended) == set(queries)
    model.result(lost)  # it had answered after all; too late


def test_a_lost_task_is_left_to_the_code() -> None:
    model = coded(3)
    first, second, third = model.submit(3)
    model.kill(model.worker(model.data(first)[0]))
    assert not model.data(first)
    model.result(*model.parities(), *model.data(second), *model.data(third))
    model.decoded(first)
    assert model.ended[first] == AnswerDecoded(first)


def test_a_lost_task_is_sent_again_if_the_code_cannot_help() -> None:
    model = coded(3, spare=2)
    first, second, third = model.submit(3)
    model.fail(*model.data(first))
    assert not model.data(first)
    model.fail(*model.data(second))  # two lost, one parity
    for query in (first, second):
        assert len(model.data(query)) == 1
    model.result(*model.data(first), *model.data(third), *model.parities())
    model.decoded(second)


def test_what_is_lost_for_good_ends_its_query() -> None:
    model = Model("uncoded", 2)
    (query,) = model.submit()
    model.fail(*model.data(query), final=True)
    assert model.ended == {query: Fail(query, FINAL)}


def test_what_is_lost_for_good_is_left_to_what_is_under_way() -> None:
    model = Model("replicate", 2)
    (query,) = model.submit()
    first, second = model.data(query)
    model.fail(first, final=True)
    model.result(second)
    assert isinstance(model.ended[query], Answer)
    model = coded(3)
    first, *others = model.submit(3)
    model.fail(*model.data(first), final=True)
    model.result(*model.parities(), *(task for query in others for task in model.data(query)))
    model.decoded(first)
    assert model.ended[first] == AnswerDecoded(first)


def test_a_lost_task_of_an_open_group_is_sent_again_at_once() -> None:
    model = coded(3)
    (query,) = model.submit()
    (lost,) = model.data(query)
    model.kill(model.worker(lost))
    (again,) = model.data(query)
    assert again != lost


def test_a_lost_parity_is_sent_again_but_not_for_ever() -> None:
    model = coded(2, spare=EXTRA_RETRIES, max_losses=100)
    model.submit(2)
    for _ in range(EXTRA_RETRIES):
        model.fail(*model.parities())
        assert len(model.parities()) == 1
    model.fail(*model.parities())
    assert not model.parities()


def test_a_failed_parity_goes_to_another_worker() -> None:
    """It is the first in turn, and every worker was given a task of the group."""
    model = coded(2)
    first, second = model.submit(2)
    model.result(*model.data(second))
    (third,) = model.submit()
    model.result(*model.data(third))
    (parity,) = model.parities()
    broken = model.worker(parity)
    model.fail(parity)
    (again,) = model.parities()
    assert model.worker(again) != broken
    model.result(again)
    model.decoded(first)


def test_a_broken_worker_gets_a_query_once() -> None:
    model = coded(2)
    first, second = model.submit(2, accept=False)
    (attempt,) = model.data(first)
    broken = model.worker(attempt)
    model.result(*model.data(second), *model.parities())
    model.fail(attempt)
    (again,) = model.data(first)
    assert model.worker(again) != broken
    model.result(again)
    assert model.ended[first] == Answer(first, again, model.worker(again))


def test_where_every_worker_failed_any_will_do() -> None:
    model = coded(2, max_losses=10)
    first, second = model.submit(2, accept=False)
    model.result(*model.data(second), *model.parities())
    seen = []
    for _ in range(3):
        (attempt,) = model.data(first)
        seen.append(model.worker(attempt))
        model.fail(attempt)
    assert set(seen) == {0, 1, 2}
    assert len(model.data(first)) == 1


def test_a_lost_member_is_sent_again_when_its_parity_is_given_up() -> None:
    model = coded(2, spare=EXTRA_RETRIES + 1)
    first, _ = model.submit(2)
    model.fail(*model.data(first))
    for _ in range(EXTRA_RETRIES + 1):
        assert not model.data(first)
        model.fail(*model.parities())
    assert len(model.data(first)) == 1


def test_all_workers_lost_and_up_again() -> None:
    model = coded(3, spare=1)
    queries = model.submit(4)
    model.kill(*range(5))
    assert not model.running
    late = model.submit(2)
    assert model.scheduler.waiting >= 6
    model.new()
    model.up(3)
    assert len(model.running) == 1
    model.up(0, 1, 2, 4)
    model.drain()
    assert all(isinstance(model.ended[query], Answer | AnswerDecoded) for query in queries + late)


def test_tasks_without_a_worker_are_dropped_when_their_query_ends() -> None:
    model = coded(2)
    model.kill(0, 1, 2)
    queries = model.submit(2, timeout=1.0)
    model.wait(1)
    assert {model.ended[query] for query in queries} == {Fail(q, DEADLINE) for q in queries}
    assert not model.scheduler.waiting


def test_a_hung_worker_is_replaced() -> None:
    model = Model("uncoded", 2, hang_timeout=3.0)
    first, second = model.submit(2)
    (hung,) = model.data(first)
    model.result(*model.data(second))
    model.wait(2.9)
    model.new()
    model.wait(0.2)
    replace, send = model.new()
    assert replace == Replace(0, "hung")
    assert isinstance(send, Send)
    assert (send.worker, send.members) == (1, (first,))
    model.result(hung)  # late: nobody asks for it
    assert first not in model.ended


def test_a_backups_worker_may_have_a_limit_of_its_own() -> None:
    model = Model("coded", 3, ErasureCode(2, backup=True), backup_hang_timeout=1.0)
    model.submit(2)
    model.new()
    model.wait(0.9)
    assert not only(model.new(), Replace)
    model.wait(0.2)
    assert only(model.new(), Replace) == [Replace(2, "hung")]
    model.wait(2.0)  # the others' is 3 s
    assert only(model.new(), Replace) == [Replace(0, "hung"), Replace(1, "hung")]


def test_a_worker_that_answers_in_time_is_not_hung() -> None:
    model = Model("uncoded", 1)
    first, second = model.submit(2)
    model.wait(2)
    model.result(*model.data(first))
    model.wait(2)
    assert not only(model.new(), Replace)
    model.result(*model.data(second))
    model.wait(10)
    assert not only(model.new(), Replace)


def test_a_second_report_of_a_death_changes_nothing() -> None:
    model = Model("uncoded", 2)
    model.submit(2)
    lost = model.running[0]
    model.kill(0)
    model.new()
    model.do(model.scheduler.worker_lost(0.0, 0, "again"))
    model.fail(lost)
    assert model.new() == []


def test_the_deadline_ends_a_query_and_drops_its_queued_task() -> None:
    model = Model("uncoded", 1, hang_timeout=100.0)
    first, second = model.submit(), model.submit(timeout=1.0)
    model.wait(1)
    assert model.ended == {second[0]: Fail(second[0], DEADLINE)}
    model.result(*model.data(first[0]))
    assert not model.running
