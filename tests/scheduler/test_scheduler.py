"""Groups that fill, dispatch, decoding, and policies that change."""

from __future__ import annotations

import pytest

from codedinvnet.codes.rules import AnswersAll
from codedinvnet.scheduler.actions import (
    DEADLINE,
    Answer,
    AnswerDecoded,
    Complete,
    Decode,
    Fail,
    Forget,
    Send,
)
from codedinvnet.scheduler.completion import PATIENCE
from codedinvnet.scheduler.group import FILLER
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.timers import FEW
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import coded, hedging

# Timers


def test_moot_timers_do_not_heap_up() -> None:
    """A deadline may be hours away, and a live timer of a hung worker is in front of them."""
    model = Model("uncoded", workers=2, hang_timeout=1e5, max_pending=1000)
    model.submit(timeout=1e6)  # which keeps its worker
    for _ in range(3000):
        (query,) = model.submit(timeout=1e6)
        (send,) = only(model.new(), Send)[-1:]
        model.result(send.attempt)
        assert query in model.ended
        model.scheduler.next_timer()
    assert len(model.scheduler.timers) < 3 * FEW


# Groups


def test_a_batch_fills_groups_at_once() -> None:
    model = coded(3, spare=4)
    queries = model.submit(7)
    sends = only(model.new(), Send)
    assert [(s.members, s.task, s.size) for s in sends if s.size > 1] == [
        (tuple(queries[:3]), 3, 3),
        (tuple(queries[3:6]), 3, 3),
    ]
    data = [s for s in sends if s.size == 1]
    assert [s.members for s in data] == [(query,) for query in queries][: len(data)]
    assert model.scheduler.flying.open_group is not None
    assert model.scheduler.flying.open_group.members == queries[6:]


def test_single_queries_fill_the_open_group() -> None:
    model = coded(3)
    first, second = model.submit(), model.submit()
    assert [send.task for send in only(model.new(), Send)] == [0, 1]
    third = model.submit()
    assert [send.task for send in only(model.new(), Send)] == [2, 3]
    parity = model.sent[model.parities()[0]]
    assert parity.members == (*first, *second, *third)
    assert model.scheduler.flying.open_group is None


def test_a_batch_does_not_wait_for_the_open_group() -> None:
    model = coded(2, spare=3)
    (lone,) = model.submit()
    pair = model.submit(2)
    parities = [model.sent[attempt] for attempt in model.parities()]
    assert [parity.members for parity in parities] == [tuple(pair)]
    (mate,) = model.submit()
    assert model.sent[model.parities()[-1]].members == (lone, mate)


def test_the_remainder_of_a_batch_fills_the_open_group_and_opens_the_next() -> None:
    model = coded(3, spare=4)
    two = model.submit(2)
    two_more = model.submit(2)
    assert model.sent[model.parities()[0]].members == (*two, two_more[0])
    assert model.scheduler.flying.open_group is not None
    assert model.scheduler.flying.open_group.members == two_more[1:]


def test_after_the_timeout_only_the_unanswered_are_coded() -> None:
    model = coded(4, spare=1)
    first, second, third = model.submit(3)
    model.result(*model.data(second))
    model.new()
    model.wait(0.021)
    actions = model.new()
    (parity,) = only(actions, Send)
    assert (parity.task, parity.members, parity.size) == (4, (first, third), 2)
    (forget,) = only(actions, Forget)
    assert forget.queries == (second,)
    # the renumbered members are decoded from what was sent under the old numbers
    model.result(*model.data(first), parity.attempt)
    (decode,) = only(model.new(), Decode)
    assert (set(decode.outputs), decode.wanted) == ({0, 4}, {third: 1})


def test_after_the_timeout_one_alone_is_copied() -> None:
    model = coded(3)
    first, second = model.submit(2)
    model.result(*model.data(first))
    model.new()
    model.wait(0.021)
    (copy,) = only(model.new(), Send)
    assert (copy.members, copy.size) == ((second,), 1)
    assert len({model.worker(attempt) for attempt in model.data(second)}) == 2
    model.result(copy.attempt)
    assert model.ended[second] == Answer(second, copy.attempt, model.worker(copy.attempt))


def test_after_the_timeout_nothing_happens_if_all_are_answered() -> None:
    model = coded(3)
    first, second = model.submit(2)
    model.result(*model.data(first), *model.data(second))
    model.new()
    model.wait(0.021)
    assert [type(action) for action in model.new()] == [Forget]
    assert not model.scheduler.flying.groups


def test_a_group_that_was_filled_in_time_has_no_timeout() -> None:
    model = coded(2)
    model.submit()
    model.submit()
    model.new()
    model.wait(1)
    assert model.new() == []


def test_a_copy_of_an_answered_member_that_left_its_group_is_forgotten() -> None:
    model = hedging("coded+hedge", workers=5, code=ErasureCode(3), group_timeout=0.05)
    (query,) = model.submit()
    model.submit()
    model.wait(0.03)  # both are copied
    original, copy = model.data(query)
    model.result(original)
    model.wait(0.03)
    model.new()
    model.result(copy)
    assert model.new() == [Forget((copy,))]


def test_answered_members_of_a_group_that_fills_later_are_coded_with_it() -> None:
    model = coded(2)
    (first,) = model.submit()
    (output,) = model.data(first)
    model.result(output)
    (second,) = model.submit()
    (parity,) = model.parities()
    model.new()
    model.result(parity)
    (decode,) = only(model.new(), Decode)
    assert (decode.outputs, decode.wanted) == ({0: output, 2: parity}, {second: 1})


def test_an_extra_task_whose_members_are_all_answered_is_not_sent() -> None:
    model = Model("coded", 6, AnswersAll(4, r=2))
    first, second = model.submit(2)
    model.result(*model.data(first))
    third, fourth = model.submit(2)
    assert {send.members for send in only(model.new(), Send) if send.group_size} == {
        (first, third),
        (second, fourth),
    }
    model = Model("coded", 6, AnswersAll(4, r=2))
    first, second, third = model.submit(3)
    model.result(*model.data(second))
    model.result(*model.data(first), *model.data(third))
    (fourth,) = model.submit()
    (extra,) = (send for send in only(model.new(), Send) if send.group_size)
    assert extra.members == (second, fourth)


# Workers


def test_the_tasks_of_a_group_go_to_workers_of_their_own() -> None:
    model = coded(4, 2, spare=3, slots=3)
    for _ in range(4):
        model.submit(4)
    for group in model.scheduler.flying.groups.values():
        tasks = [a for a in model.scheduler.attempts.values() if a.group is group]
        assert len(tasks) == len({attempt.worker for attempt in tasks}) == 6


def test_least_loaded_workers_first_and_ties_in_turn() -> None:
    model = Model("uncoded", 3, slots=2)
    queries = model.submit(3)
    assert [send.worker for send in only(model.new(), Send)] == [0, 1, 2]
    model.result(*model.data(queries[1]))
    model.submit(2)
    assert [send.worker for send in only(model.new(), Send)] == [1, 0]
    assert model.loads == [2, 1, 1]


def test_a_held_answer_frees_its_worker() -> None:
    model = Model("uncoded", 1)
    first, second = model.submit(2)
    (held,) = model.data(first)
    model.release(held)
    (sent,) = model.data(second)
    model.result(sent)
    assert first not in model.ended
    model.kill(0)  # the held answer has left it
    model.wait(60)
    model.result(held)
    assert model.ended[first] == Answer(first, held, model.worker(held))


def test_queued_tasks_of_answered_queries_never_start() -> None:
    model = Model("replicate", 2)
    first, second = model.submit(2)
    assert set(model.running.values()) == set(model.data(first))
    model.result(model.data(first)[0])  # starts the first copy of the second
    model.result(*model.data(second))  # its other copy is behind the first's other copy
    assert set(model.ended) == {first, second}
    sent = model.scheduler.dispatcher.sent
    model.drain()
    assert model.scheduler.dispatcher.sent == sent == 3


def test_a_queued_parity_is_dropped_when_its_group_is_answered() -> None:
    model = coded(2)
    model.kill(1, 2)
    first, second = model.submit(2)  # the parity waits behind them
    model.result(*model.data(first))
    model.result(*model.data(second))
    assert model.scheduler.dispatcher.sent == 2
    assert not model.scheduler.flying.groups


# Decoding


def test_decoded_as_soon_as_determined() -> None:
    model = coded(3)
    first, second, third = model.submit(3)
    (parity,) = model.parities()
    (a,), (b,) = model.data(first), model.data(third)
    model.result(parity, a)
    assert not only(model.new(), Decode)
    model.result(b)
    (decode,) = only(model.new(), Decode)
    assert decode.outputs == {0: a, 2: b, 3: parity}
    assert decode.wanted == {second: 1}
    model.decoded(second)
    assert model.new() == [AnswerDecoded(second)]
    (late,) = model.data(second)
    model.result(late)
    complete, *rest = model.new()
    assert complete == Complete(
        decode.group,
        3,
        {0: a, 1: late, 2: b, 3: parity},
        {0: model.worker(a), 1: model.worker(late), 2: model.worker(b), 3: model.worker(parity)},
    )
    assert [type(action) for action in rest] == [Forget]


def test_two_of_one_group_are_decoded_together_from_two_parities() -> None:
    model = coded(3, 2)
    first, second, third = model.submit(3)
    model.result(*model.parities(), *model.data(second))
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {first: 0, third: 2}
    model.decoded(third)
    model.decoded(first)


def test_a_direct_answer_overtakes_a_decoding() -> None:
    model = coded(2)
    first, second = model.submit(2)
    model.result(*model.parities(), *model.data(first))
    assert model.decoding == [second]
    (late,) = model.data(second)
    model.result(late)
    assert model.ended[second] == Answer(second, late, model.worker(late))
    model.new()
    model.decoded(second)
    assert model.new() == []


def test_who_does_not_accept_decoded_answers_gets_none() -> None:
    model = coded(2)
    first, second = model.submit(2, accept=False)
    model.result(*model.parities(), *model.data(first))
    assert not only(model.new(), Decode)
    model.fail(*model.data(second))  # a parity is no hope for it
    (again,) = model.data(second)
    model.result(again)
    assert model.ended[second] == Answer(second, again, model.worker(again))


def test_each_query_of_a_group_has_its_own_mind_about_decoded_answers() -> None:
    model = coded(3, 2)
    (willing,), (unwilling,), (answered,) = (
        model.submit(),
        model.submit(accept=False),
        model.submit(),
    )
    model.result(*model.parities(), *model.data(answered))
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {willing: 0}
    assert unwilling not in model.ended


def test_fillers_make_up_a_fixed_size() -> None:
    model = Model("coded", 5, ErasureCode(4, fixed_size=True))
    first, second = model.submit(2)
    model.wait(0.021)
    (parity,) = (model.sent[attempt] for attempt in model.parities())
    assert (parity.members, parity.size, parity.task) == ((first, second), 4, 4)
    (a,) = model.data(first)
    model.result(parity.attempt, a)
    (decode,) = only(model.new(), Decode)
    assert decode.outputs == {0: a, 2: FILLER, 3: FILLER, 4: parity.attempt}
    assert (decode.size, decode.wanted) == (4, {second: 1})
    (late,) = model.data(second)
    model.result(late)
    (complete,) = only(model.new(), Complete)
    assert set(complete.workers) == {0, 1, 4}


def test_a_code_that_is_not_systematic_waits_for_its_group() -> None:
    model = Model("coded", 5, ErasureCode(3, 2, systematic=False))
    pair = model.submit(2)
    assert model.new() == []
    model.wait(0.021)
    sends = only(model.new(), Send)
    assert [(s.task, s.members, s.size) for s in sends] == [
        (task, tuple(pair), 2) for task in (0, 1, 3, 4)
    ]
    model.result(sends[1].attempt)
    assert not only(model.new(), Decode)
    model.result(sends[3].attempt)
    (decode,) = only(model.new(), Decode)
    assert decode.outputs == {1: sends[1].attempt, 4: sends[3].attempt}
    assert decode.wanted == {pair[0]: 0, pair[1]: 1}
    for query in pair:
        model.decoded(query)
        assert model.ended[query] == AnswerDecoded(query)


def test_a_code_that_is_not_systematic_sends_again_when_too_many_are_lost() -> None:
    model = Model("coded", 8, ErasureCode(3, 2, systematic=False))
    queries = model.submit(3)
    tasks = sorted(model.running.values())
    model.fail(tasks[0])
    model.fail(tasks[3])
    model.new()
    model.fail(tasks[1])  # two are left, three are needed
    again = only(model.new(), Send)
    assert {send.task for send in again} == {0, 1, 3}
    model.result(*[send.attempt for send in again])
    assert model.decoding == queries


def test_losses_that_the_code_makes_up_for_are_nobodys() -> None:
    """With as many parities as a query may be lost times, it is sent again all the same."""
    model = Model("coded", 16, ErasureCode(3, 6, systematic=False))
    queries = model.submit(3)
    tasks = sorted(model.running.values())
    for task in tasks[:6]:
        model.fail(task)
    model.new()
    model.fail(tasks[6])  # two are left, three are needed
    again = only(model.new(), Send)
    assert {send.task for send in again} == set(range(7))
    model.result(*[send.attempt for send in again])
    assert model.decoding == queries


def test_a_fixed_size_code_that_is_not_systematic_computes_on_fillers() -> None:
    model = Model("coded", 5, ErasureCode(3, 2, fixed_size=True, systematic=False))
    (query,) = model.submit()
    model.wait(0.021)
    sends = only(model.new(), Send)
    assert [(send.task, send.size) for send in sends] == [(i, 3) for i in range(5)]
    model.result(*[send.attempt for send in sends[2:]])
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {query: 0}


def test_a_late_output_of_a_failed_query_still_serves_its_group() -> None:
    model = coded(2, hang_timeout=100.0)
    (hasty,), (patient,) = model.submit(timeout=1.0), model.submit()
    model.fail(*model.data(patient))
    model.wait(1)
    assert set(model.ended) == {hasty}
    model.result(*model.data(hasty), *model.parities())
    assert model.decoding == [patient]


def test_a_failed_query_takes_no_hope_from_its_group() -> None:
    """Its queued task is dropped with it, and another member had counted on that output."""
    model = coded(2, hang_timeout=100.0)
    model.submit(2)  # all three workers are at work
    (patient,) = model.submit()
    (hasty,) = model.submit(timeout=PATIENCE / 2)
    model.result(model.running[0])
    (attempt,) = model.data(patient)
    model.fail(attempt)  # its worker takes no other task of the group
    assert not model.scheduler.queries[patient].attempts, "it hopes for the other's output"
    assert not model.data(hasty)
    model.wait(PATIENCE / 2)
    assert model.ended[hasty] == Fail(hasty, DEADLINE)
    model.drain()
    assert isinstance(model.ended[patient], Answer)


def test_a_lost_query_whose_decoding_does_not_come_is_sent_again() -> None:
    """The output that it waits for is on a worker that hangs."""
    model = coded(2, hang_timeout=100.0)
    hung, lost = model.submit(2)
    model.result(*model.parities())
    model.fail(*model.data(lost))
    assert not model.data(lost)  # it hopes for the other member's output
    model.wait(PATIENCE)
    (again,) = model.data(lost)
    model.result(again)
    assert isinstance(model.ended[lost], Answer)
    assert model.decoding == [hung]  # and with it the hung worker's query is decoded


def test_a_query_that_kills_its_workers_is_given_up() -> None:
    model = Model("uncoded", 3, max_losses=3)
    (query,) = model.submit()
    for _ in range(3):
        (attempt,) = model.data(query)
        worker = model.worker(attempt)
        model.kill(worker)
        model.up(worker)
    assert model.ended[query] == Fail(query, "lost 3 times: killed")


def test_too_many_queries_are_refused_whole() -> None:
    model = Model("uncoded", 1, max_pending=3)
    first, _ = model.submit(2)
    model.new()
    assert model.offer(2) is None
    assert model.new() == []
    assert model.offer(1) is not None
    assert model.offer(1) is None
    model.result(*model.data(first))
    assert model.offer(1) is not None


@pytest.mark.parametrize(
    ("policy", "code", "needed"),
    [("coded", ErasureCode(3, 2), 5), ("replicate", None, 2), ("uncoded", ErasureCode(3), 1)],
)
def test_too_few_workers(policy: str, code: ErasureCode | None, needed: int) -> None:
    with pytest.raises(ValueError, match=f"{needed - 1} are too few: .* needs {needed},"):
        Scheduler(Rules(needed - 1, POLICIES[policy]), code)
    Scheduler(Rules(needed, POLICIES[policy]), code)


def test_the_work_of_a_policy_is_counted() -> None:
    for policy, work in (("uncoded", 12), ("replicate", 24), ("coded", 16)):
        model = Model(policy, 30, ErasureCode(3))
        model.submit(12)
        assert model.scheduler.dispatcher.sent == work
