"""Queries that are cancelled, and what their groups still need of them."""

from __future__ import annotations

from codedinvnet.scheduler.actions import Forget, Send
from tests.scheduler.model import only
from tests.scheduler.situations import busy, coded, finish, own, parity


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


def test_one_that_a_worker_is_at_stays_in_its_open_group() -> None:
    model = coded(3)
    gone, slow = model.submit(2)
    model.cancel(gone)
    (third,) = model.submit()
    assert parity(model, slow).group.members == [gone, slow, third]
    model.result(*model.data(gone), *model.data(third), *model.parities())
    assert model.decoding == [slow]
