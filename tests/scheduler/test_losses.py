"""Tasks and workers that are lost, and the deadline."""

from __future__ import annotations

from codedinvnet.scheduler.actions import DEADLINE, Answer, AnswerDecoded, Fail, Replace, Send
from codedinvnet.scheduler.events import WorkerLost
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.model import FINAL, ErasureCode, Model, only
from tests.scheduler.situations import coded


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


def test_what_is_lost_for_good_ends_its_query_unless_something_is_under_way() -> None:
    model = Model("uncoded", 2)
    (query,) = model.submit()
    model.fail(*model.data(query), final=True)
    assert model.ended == {query: Fail(query, FINAL)}
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


def test_what_wants_a_direct_answer_does_not_wait_for_a_parity() -> None:
    model = coded(2, spare=3, max_losses=2)
    (first,), (second,) = model.submit(accept=False), model.submit()
    model.fail(*model.data(first))
    assert len(model.parities()) == len(model.data(first)) == 1
    model.fail(*model.data(first))
    assert list(model.ended) == [first]
    assert isinstance(model.ended[first], Fail)
    model.result(*model.data(second))


def test_a_lost_parity_is_sent_again_but_not_for_ever_and_then_its_member_is() -> None:
    model = coded(2, spare=TUNING.extra_retries + 1, max_losses=100)
    first, _ = model.submit(2)
    model.fail(*model.data(first))
    for _ in range(TUNING.extra_retries + 1):
        assert not model.data(first)
        assert len(model.parities()) == 1
        model.fail(*model.parities())
    assert (len(model.parities()), len(model.data(first))) == (0, 1)


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
    model.result(hung)  # too late
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
    model.handle(WorkerLost(0, "again"))
    model.fail(lost)
    assert model.new() == []


def test_the_deadline_ends_a_query_and_drops_its_queued_task() -> None:
    model = Model("uncoded", 1, hang_timeout=100.0)
    first, second = model.submit(), model.submit(timeout=1.0)
    model.wait(1)
    assert model.ended == {second[0]: Fail(second[0], DEADLINE)}
    model.result(*model.data(first[0]))
    assert not model.running
