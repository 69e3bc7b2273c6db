"""Tasks and workers that are lost, and the deadline."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.actions import DEADLINE, Answer, AnswerDecoded, Fail, Replace, Send
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.model import FINAL, Model, only
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


def test_the_deadline_ends_a_query_and_drops_its_queued_task() -> None:
    model = Model("uncoded", 1, hang_timeout=100.0)
    first, second = model.submit(), model.submit(timeout=1.0)
    model.wait(1)
    assert model.ended == {second[0]: Fail(second[0], DEADLINE)}
    model.result(*model.data(first[0]))
    assert not model.running


def test_a_query_that_is_lost_too_often_fails() -> None:
    model = Model("uncoded", 3, max_losses=2)
    (query,) = model.submit()
    model.fail(*model.data(query))
    assert not model.ended
    model.fail(*model.data(query))
    assert isinstance(model.ended[query], Fail)


def busy(model: Model, seconds: float) -> None:
    """Let all workers do what they have in a time, and take what waits."""
    running = list(model.at)
    model.wait(seconds)
    model.result(*running)


@pytest.fixture(params=[4, None])
def usual(request: pytest.FixtureRequest) -> Model:
    """Three workers with several slots, found or given, whose usual times are known."""
    model = Model("uncoded", 3, slots=request.param, hang_timeout=100.0)
    for _ in range(20):
        model.submit(3)
        busy(model, 0.01)
    return model


def test_a_worker_that_is_back_gets_one_task_more_for_each_that_it_does_in_normal_time(
    usual: Model,
) -> None:
    usual.kill(0)
    usual.up(0)
    usual.submit(100)
    assert usual.loads[0] == 1
    full = usual.loads[1]
    assert full > 2
    for each in range(2, full + 1):
        busy(usual, 0.01)
        assert usual.loads[0] >= min(each, full)
    usual.drain()


def test_a_worker_that_is_back_and_cold_gets_one_task_at_a_time_but_not_for_ever(
    usual: Model,
) -> None:
    usual.kill(0)
    usual.up(0)
    usual.submit(40)
    for _ in range(2):
        cold = [attempt for attempt, worker in usual.at.items() if worker == 0]
        usual.wait(1.0)
        usual.result(*cold)
        assert usual.loads[0] <= 1 < usual.loads[1]
    usual.wait(TUNING.ramp)
    assert usual.loads[0] > 1, "its tasks are long: that says nothing"
    usual.drain()


@pytest.mark.parametrize("count", [2, 3])
def test_workers_that_come_back_together_get_what_the_others_could_not_do(
    usual: Model, count: int
) -> None:
    usual.kill(*range(count))
    usual.up(*range(count))
    usual.submit(100)
    assert min(usual.loads) > 1
    usual.drain()
