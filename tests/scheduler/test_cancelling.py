"""Queries that are cancelled, and what their groups still need of them."""

from __future__ import annotations

from codedinvnet.scheduler.actions import Decode, Forget, Send
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import busy, coded, finish, know_times, own, parity


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


def test_when_a_cancelled_member_is_lost_the_other_is_sent_again() -> None:
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
    assert dict(decode.wanted) == {fourth: 2}


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
    assert Forget((copy.identity,)) in model.new(), "it is no other query's output"


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


def test_an_open_group_ends_when_its_last_member_is_cancelled() -> None:
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
