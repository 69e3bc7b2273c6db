"""Queries that are cancelled, and what their groups still need of them."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.actions import Decode, Forget, Send
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import busy, coded, finish, hedging, know_times, own, parity

# Queries that nobody waits for


@pytest.mark.parametrize("policy", ["uncoded", "replicate", "hedge"])
def test_queued_tasks_of_cancelled_queries_never_start(policy: str) -> None:
    model = Model(policy, 2, max_pending=8)
    first, second = model.submit(2)
    batch = model.submit(6)
    running = dict(model.running)
    assert model.offer() is None
    model.cancel(*batch)
    model.cancel(*batch)  # what is over is over
    assert model.running == running
    assert (sum(model.loads) + model.scheduler.waiting) == 2 + (policy == "replicate") * 2
    assert model.offer(6) is not None, "there is no room for others"
    model.cancel(first, second)


def test_what_a_worker_is_at_is_finished_and_forgotten() -> None:
    model = Model("uncoded", 1)
    (query,) = model.submit()
    (attempt,) = model.data(query)
    model.cancel(query)
    assert model.new() == [Send(0, attempt, 0, (query,), 1)]
    model.result(attempt)
    assert model.new() == [Forget((attempt,), (query,))]


def test_what_is_lost_of_a_cancelled_query_is_not_sent_again() -> None:
    model = coded(2, spare=2)
    queries = model.submit(2)
    lost = [*model.parities(), *model.data(queries[0])]
    model.cancel(*queries)
    model.new()
    model.fail(*lost)
    model.kill(model.worker(*model.data(queries[1])))
    model.wait(10)
    assert not only(model.new(), Send)


def test_a_cancelled_query_is_not_copied() -> None:
    model = hedging()
    (query,) = model.submit()
    model.cancel(query)
    model.new()
    model.wait(1)
    assert not only(model.new(), Send)
    assert model.scheduler.dispatcher.hedges == 0


def test_a_cancelled_querys_copy_is_dropped_from_the_queue() -> None:
    model = hedging("coded+hedge", workers=3, code=ErasureCode(2))
    queries = model.submit(2)
    model.wait(0.03)
    assert model.scheduler.dispatcher.hedges == model.scheduler.waiting == 2
    model.cancel(queries[0])
    (left,) = [a for a in model.scheduler.attempts.values() if a.started is None]
    assert left.query is not None
    assert left.query.identity == queries[1]


def test_of_a_sealed_group_all_is_dropped_when_all_are_cancelled() -> None:
    model = busy(2)
    queries = model.submit(2)
    assert (sum(model.loads) + model.scheduler.waiting) == 6
    model.cancel(*queries)
    assert (sum(model.loads) + model.scheduler.waiting) == 3
    assert only(model.new(), Forget) == [Forget((), tuple(queries))]


def test_the_output_of_a_cancelled_member_still_decodes_its_group() -> None:
    model = coded(2, hang_timeout=100.0)
    gone, slow = model.submit(2)
    model.cancel(gone)
    model.result(*model.data(gone), *model.parities())
    assert model.decoding == [slow]
    model.decoded(slow)


def test_a_cancelled_member_that_its_sealed_group_may_need_is_computed() -> None:
    """No parity makes up for a slow one without it."""
    model = busy(2)
    gone, slow = model.submit(2)
    (task,) = own(model, gone)
    model.cancel(gone)
    finish(model, task, parity(model, slow))
    assert model.decoding == [slow]


def test_it_is_not_computed_when_nobody_of_its_group_waits_any_more() -> None:
    model = busy(2)
    gone, quick = model.submit(2)
    model.cancel(gone)
    finish(model, *own(model, quick))
    sent = model.scheduler.dispatcher.sent
    model.drain()
    assert model.scheduler.dispatcher.sent == sent


def test_a_cancelled_member_that_is_lost_lets_nobody_wait() -> None:
    model = coded(2, spare=1, hang_timeout=100.0)
    gone, lost = model.submit(2)
    model.cancel(gone)
    model.fail(*model.data(lost))
    assert not model.data(lost)  # it hopes for the other member's output
    model.new()
    model.fail(*model.data(gone))
    assert [send.members for send in only(model.new(), Send)] == [(lost,)]


def test_one_that_no_worker_was_given_leaves_its_open_group() -> None:
    model = busy(3)
    first, gone = model.submit(2)
    model.cancel(gone)
    assert model.new() == [Forget((), (gone,))]
    others = model.submit(2)
    tasks = [task for query in (first, *others) for task in own(model, query)]
    tasks.append(parity(model, first))
    assert tasks[-1].group.members == [first, *others]
    finish(model, *tasks[1:])
    assert model.decoding == [first]


def test_those_behind_one_that_leaves_are_decoded_under_their_new_numbers() -> None:
    model = coded(3)
    gone, second = model.submit(2)
    model.result(*model.data(second))
    model.kill(*range(4))
    (lost,) = own(model, gone)
    assert lost.started is None
    model.cancel(gone)
    model.up(*range(4))
    third, fourth = model.submit(2)
    model.new()
    finish(model, *own(model, third), parity(model, fourth))
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {fourth: 2}


def test_a_copy_of_an_answered_member_moves_up_with_it() -> None:
    model = coded(3, policy="coded+hedge", hedge_share=1.0, group_timeout=1.0)
    know_times(model)
    gone, second = model.submit(2)
    model.wait(0.02)
    original, copy = own(model, second)
    model.release(original.identity)
    model.kill(*{0, 1, 2, 3} - {copy.worker})
    assert all(attempt.started is None for attempt in own(model, gone))
    model.result(original.identity)
    model.cancel(gone)
    model.up(*{0, 1, 2, 3} - {copy.worker})
    model.submit(2)
    model.new()
    model.result(copy.identity)
    assert Forget((copy.identity,)) in model.new(), "it is nobody else's output"


def test_one_that_a_worker_is_at_stays_in_its_open_group() -> None:
    model = coded(3)
    gone, slow = model.submit(2)
    model.cancel(gone)
    (third,) = model.submit()
    assert parity(model, slow).group.members == [gone, slow, third]
    model.result(*model.data(gone), *model.data(third), *model.parities())
    assert model.decoding == [slow]


def test_after_the_timeout_the_cancelled_are_not_coded() -> None:
    model = coded(4, spare=1)
    first, gone, third = model.submit(3)
    model.cancel(gone)
    model.new()
    model.wait(0.021)
    (send,) = only(model.new(), Send)
    assert send.members == (first, third)


def test_a_code_without_direct_answers_computes_nothing_of_who_left_in_time() -> None:
    model = Model("coded", 5, ErasureCode(3, 2, systematic=False))
    gone, stays = model.submit(2)
    model.cancel(gone)
    model.wait(0.021)
    assert {send.members for send in only(model.new(), Send)} == {(stays,)}
    model.cancel(*model.submit(2))
    model.wait(0.021)
    assert not only(model.new(), Send)


def test_a_group_that_nobody_is_left_in_is_no_more() -> None:
    model = busy(3)
    gone = model.submit(2)
    model.wait(0.015)
    model.cancel(*gone)
    assert only(model.new(), Forget)[-2:] == [Forget((), (query,)) for query in gone]
    assert model.scheduler.flying.open_group is None
    late = model.submit(2)  # with a time of its own
    model.wait(0.015)
    assert model.scheduler.flying.open_group is not None
    model.wait(0.006)
    assert model.scheduler.flying.open_group is None
    assert parity(model, late[0]).group.members == late
