from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codedinvnet.codes.rules import AnswersAll
from codedinvnet.codes.rules import Rules as CodeRules
from codedinvnet.serving.rules.actions import (
    DEADLINE,
    Answer,
    AnswerDecoded,
    Complete,
    Decode,
    Fail,
    Forget,
    Replace,
    Send,
)
from codedinvnet.serving.rules.group import FILLER
from codedinvnet.serving.rules.hedging import BUCKET
from codedinvnet.serving.rules.recent import FEWEST
from codedinvnet.serving.rules.scheduler import OVERTIME, PARITY_RETRIES, PATIENCE, Scheduler
from codedinvnet.serving.rules.settings import POLICIES, Rules
from codedinvnet.serving.rules.tasks import NOBODY, Attempt
from codedinvnet.serving.rules.timers import FEW
from tests.serving.rules.model import ErasureCode, Model, only


def coded(k: int = 3, r: int = 1, *, spare: int = 0, policy: str = "coded", **rules: Any) -> Model:
    """Return a model with one worker for each task of a group, and some more."""
    return Model(policy, k + r + spare, ErasureCode(k, r), **rules)


def hedging(policy: str = "hedge", **options: Any) -> Model:
    """Return a model that knows latencies of 1 to 20 ms and has saved up copies."""
    model = Model(policy, **{"workers": 2, "hedge_share": 0.5, **options})
    for i in range(FEWEST):
        (query,) = model.submit()
        assert model.data(query)
        model.wait((i + 1) / 1000)
        while model.running:
            model.result(next(iter(model.running.values())))
    model.wait(1)  # the open group is over
    model.new()
    return model


def know_times(model: Model, slow: float = 1.0) -> None:
    """Let a model know that data tasks take 10 to 15 ms, and on worker 0 `slow` times as long."""
    scheduler = model.scheduler
    for i in range(FEWEST):
        for worker in range(model.rules.workers):
            scheduler.pace.took(0.0, worker, 0, 0.015 if i % 2 else 0.010)
        scheduler.latencies.add(0.015)
    for _ in range(2 * (slow > 1)):
        scheduler.pace.took(0.0, 0, 0, 0.015 * slow)
    scheduler.binding.reorder(0)


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
    assert model.scheduler.open_group is not None
    assert model.scheduler.open_group.members == queries[6:]
    model.drain()


def test_single_queries_fill_the_open_group() -> None:
    model = coded(3)
    first, second = model.submit(), model.submit()
    assert [send.task for send in only(model.new(), Send)] == [0, 1]
    third = model.submit()
    assert [send.task for send in only(model.new(), Send)] == [2, 3]
    parity = model.sent[model.parities()[0]]
    assert parity.members == (*first, *second, *third)
    assert model.scheduler.open_group is None
    model.drain()


def test_a_batch_does_not_wait_for_the_open_group() -> None:
    model = coded(2, spare=3)
    (lone,) = model.submit()
    pair = model.submit(2)
    parities = [model.sent[attempt] for attempt in model.parities()]
    assert [parity.members for parity in parities] == [tuple(pair)]
    (mate,) = model.submit()
    assert model.sent[model.parities()[-1]].members == (lone, mate)
    model.drain()


def test_the_remainder_of_a_batch_fills_the_open_group_and_opens_the_next() -> None:
    model = coded(3, spare=4)
    two = model.submit(2)
    two_more = model.submit(2)
    assert model.sent[model.parities()[0]].members == (*two, two_more[0])
    assert model.scheduler.open_group is not None
    assert model.scheduler.open_group.members == two_more[1:]
    model.drain()


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
    model.drain()


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
    assert model.ended[second] == Answer(second, copy.attempt)
    model.drain()


def test_after_the_timeout_nothing_happens_if_all_are_answered() -> None:
    model = coded(3)
    first, second = model.submit(2)
    model.result(*model.data(first), *model.data(second))
    model.new()
    model.wait(0.021)
    assert [type(action) for action in model.new()] == [Forget]
    assert not model.scheduler.groups
    model.drain()


def test_a_group_that_was_filled_in_time_has_no_timeout() -> None:
    model = coded(2)
    model.submit()
    model.submit()
    model.new()
    model.wait(1)
    assert model.new() == []
    model.drain()


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
    model.drain()


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
    model.drain()


# Workers


@pytest.mark.parametrize(("routing", "slots"), [("least-loaded", 3), ("round-robin", 1)])
def test_the_tasks_of_a_group_go_to_workers_of_their_own(routing: str, slots: int) -> None:
    model = coded(4, 2, spare=3, routing=routing, slots=slots)
    for _ in range(4):
        model.submit(4)
    for group in model.scheduler.groups.values():
        tasks = [a for a in model.scheduler.attempts.values() if a.group is group]
        assert len(tasks) == len({attempt.worker for attempt in tasks}) == 6
    model.drain()


def test_least_loaded_workers_first_and_ties_in_turn() -> None:
    model = Model("uncoded", 3, slots=2)
    queries = model.submit(3)
    assert [send.worker for send in only(model.new(), Send)] == [0, 1, 2]
    model.result(*model.data(queries[1]))
    model.submit(2)
    assert [send.worker for send in only(model.new(), Send)] == [1, 0]
    assert model.loads == [2, 1, 1]
    model.drain()


def test_round_robin_goes_by_turns_whatever_the_load() -> None:
    model = Model("uncoded", 3, routing="round-robin")
    queries = model.submit(3)
    model.result(*model.data(queries[2]))
    model.new()
    model.submit(3)
    assert [send.worker for send in only(model.new(), Send)] == [2]
    assert model.loads == [2, 2, 1]
    model.kill(0)
    model.submit()
    assert model.loads[0] == 0
    model.drain()


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
    assert model.ended[first] == Answer(first, held)
    model.drain()


def test_queued_tasks_of_answered_queries_never_start() -> None:
    model = Model("replicate", 2)
    first, second = model.submit(2)
    assert set(model.running.values()) == set(model.data(first))
    model.result(model.data(first)[0])  # starts the first copy of the second
    model.result(*model.data(second))  # its other copy is behind the first's other copy
    assert set(model.ended) == {first, second}
    sent = model.scheduler.sent
    model.drain()
    assert model.scheduler.sent == sent == 3


def test_a_queued_parity_is_dropped_when_its_group_is_answered() -> None:
    model = coded(2)
    model.kill(1, 2)
    first, second = model.submit(2)  # the parity waits behind them
    model.result(*model.data(first))
    model.result(*model.data(second))
    assert model.scheduler.sent == 2
    assert not model.scheduler.groups
    model.drain()


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
    model.drain()


def test_two_of_one_group_are_decoded_together_from_two_parities() -> None:
    model = coded(3, 2)
    first, second, third = model.submit(3)
    model.result(*model.parities(), *model.data(second))
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {first: 0, third: 2}
    model.decoded(third)
    model.decoded(first)
    model.drain()


def test_a_direct_answer_overtakes_a_decoding() -> None:
    model = coded(2)
    first, second = model.submit(2)
    model.result(*model.parities(), *model.data(first))
    assert model.decoding == [second]
    (late,) = model.data(second)
    model.result(late)
    assert model.ended[second] == Answer(second, late)
    model.new()
    model.decoded(second)
    assert model.new() == []
    model.drain()


def test_who_does_not_accept_decoded_answers_gets_none() -> None:
    model = coded(2)
    first, second = model.submit(2, accept=False)
    model.result(*model.parities(), *model.data(first))
    assert not only(model.new(), Decode)
    model.fail(*model.data(second))  # a parity is no hope for it
    (again,) = model.data(second)
    model.result(again)
    assert model.ended[second] == Answer(second, again)
    model.drain()


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
    model.drain()


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
    model.drain()


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
    model.drain()


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
    model.drain()


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
    model.drain()


def test_a_fixed_size_code_that_is_not_systematic_computes_on_fillers() -> None:
    model = Model("coded", 5, ErasureCode(3, 2, fixed_size=True, systematic=False))
    (query,) = model.submit()
    model.wait(0.021)
    sends = only(model.new(), Send)
    assert [(send.task, send.size) for send in sends] == [(i, 3) for i in range(5)]
    model.result(*[send.attempt for send in sends[2:]])
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {query: 0}
    model.drain()


# Copies


def test_replicate_sends_two_copies_to_two_workers_and_takes_the_first() -> None:
    model = Model("replicate", 3)
    (query,) = model.submit()
    one, other = model.data(query)
    assert model.worker(one) != model.worker(other)
    model.result(other)
    assert model.ended[query] == Answer(query, other)
    model.new()
    model.result(one)
    assert Forget((one,)) in model.new()
    model.drain()


def test_a_copy_leaves_when_a_task_has_run_for_longer_than_most() -> None:
    model = hedging()
    (query,) = model.submit()
    (first,) = model.data(query)
    model.wait(0.0205)
    assert model.data(query) == [first]
    model.wait(0.001)
    _, copy = model.data(query)
    assert model.worker(copy) != model.worker(first)
    assert model.scheduler.hedges == 1
    model.wait(1)
    assert model.data(query) == [first, copy]
    model.result(copy)
    assert model.ended[query] == Answer(query, copy)
    model.drain()


def test_no_hedge_for_an_answered_query_nor_before_latencies_are_known() -> None:
    model = Model("hedge", 2)
    (early,) = model.submit()
    model.wait(1)
    assert len(model.data(early)) == 1
    model.drain()
    model = hedging()
    (query,) = model.submit()
    model.result(*model.data(query))
    model.wait(1)
    assert model.scheduler.hedges == 0
    model.drain()


def test_hedges_are_paid_from_a_bucket() -> None:
    model = hedging(workers=40, hedge_share=0.1)  # 2 copies saved up
    queries = model.submit(20)  # and 2 more
    model.wait(0.05)
    copied = [query for query in queries if len(model.data(query)) == 2]
    assert copied == queries[:4]
    assert model.scheduler.budget.tokens < 1
    model.drain()


def test_the_bucket_has_a_bottom_and_a_brim() -> None:
    model = Model("hedge", 2, hedge_share=1.0)
    for _ in range(30):
        (query,) = model.submit()
        model.result(*model.data(query))
    assert model.scheduler.budget.tokens == BUCKET
    model.drain()


def unsure(**options: Any) -> tuple[Model, int]:
    """Return a model in which a member was decoded without confidence, and the member."""
    settings = {"workers": 4, "code": ErasureCode(2), "hedge_share": 1.0, **options}
    model = Model("coded+hedge", **settings)
    timeout = options.pop("timeout", 5.0)
    first, second = model.submit(2, timeout=timeout)
    model.result(*model.parities(), *model.data(first))
    model.new()
    model.decoded(second, sure=False)
    return model, second


def test_an_unsure_decoding_is_checked_by_a_copy() -> None:
    model, query = unsure()
    first, copy = model.data(query)
    assert [type(action) for action in model.new()] == [Send]
    assert model.worker(first) != model.worker(copy)
    assert query not in model.ended
    model.result(copy)
    assert model.ended[query] == Answer(query, copy)
    model.drain()


def test_an_unsure_decoding_is_taken_when_the_copies_are_lost() -> None:
    model, query = unsure()
    first, copy = model.data(query)
    model.fail(copy)
    assert query not in model.ended
    model.kill(model.worker(first))
    assert model.ended[query] == AnswerDecoded(query)
    model.drain()


def test_an_unsure_decoding_is_taken_at_the_deadline() -> None:
    model, query = unsure(hang_timeout=100.0)
    model.wait(4.9)
    assert query not in model.ended
    model.wait(0.2)
    assert model.ended[query] == AnswerDecoded(query)
    model.drain()


def test_an_unsure_decoding_is_taken_when_there_is_no_budget() -> None:
    model, query = unsure(hedge_share=0.0)
    assert model.ended[query] == AnswerDecoded(query)
    model.drain()


def test_an_unsure_decoding_waits_for_the_copy_that_there_is() -> None:
    model = hedging("coded+hedge", workers=4, code=ErasureCode(2), hang_timeout=100.0)
    first, second = model.submit(2)
    model.wait(0.03)
    assert model.scheduler.hedges == 2
    model.result(*model.parities(), model.data(first)[0])
    model.decoded(second, sure=False)
    assert model.scheduler.hedges == 2
    assert second not in model.ended
    model.drain()


def test_without_hedging_every_decoding_is_taken() -> None:
    model = coded(2)
    first, second = model.submit(2)
    model.result(*model.parities(), *model.data(first))
    model.decoded(second, sure=False)
    assert model.ended[second] == AnswerDecoded(second)
    model.drain()


# Decodings that are withheld


def withheld(policy: str, **options: Any) -> tuple[Model, int]:
    """Return a model in which a member's decoded answer was withheld, and the member."""
    settings = {"workers": 4, "code": ErasureCode(2), "hedge_share": 1.0, **options}
    model = Model(policy, **settings)
    first, second = model.submit(2, timeout=5.0)
    model.result(*model.parities(), *model.data(first))
    model.decoding.remove(second)
    model.decoded_ones.add(second)
    model.new()
    model.do(model.scheduler.withheld(model.now, second))
    return model, second


def test_a_withheld_decoding_waits_for_the_direct_answer() -> None:
    model, query = withheld("coded", hang_timeout=100.0)
    (own,) = model.data(query)
    assert query not in model.ended
    model.result(own)
    assert model.ended[query] == Answer(query, own)
    model.drain()


def test_a_withheld_decoding_is_copied_where_copies_are_sent() -> None:
    model, query = withheld("coded+hedge")
    own, copy = model.data(query)
    assert [type(action) for action in model.new()] == [Send]
    model.fail(own)
    assert query not in model.ended
    model.result(copy)
    assert model.ended[query] == Answer(query, copy)
    model.drain()


def test_a_withheld_decoding_is_not_taken_when_its_own_task_is_lost() -> None:
    model, query = withheld("coded", hang_timeout=100.0)
    (own,) = model.data(query)
    model.fail(own)
    (again,) = model.data(query)
    assert query not in model.ended
    model.result(again)
    assert model.ended[query] == Answer(query, again)
    model.drain()


def test_a_withheld_decoding_is_not_taken_at_the_deadline() -> None:
    model, query = withheld("coded+hedge", hang_timeout=100.0)
    model.wait(6.0)
    assert isinstance(model.ended[query], Fail)
    model.drain()


# Losses


@pytest.mark.parametrize(("routing", "load"), [("least-loaded", 1), ("round-robin", 6)])
def test_a_lost_workers_tasks_go_to_another(routing: str, load: int) -> None:
    model = Model("uncoded", 2, routing=routing)
    queries = model.submit(6)
    lost = model.running[0]
    model.kill(0)
    assert model.new()[-1] == Replace(0, "killed")
    assert model.loads == [0, load]
    for _ in queries:
        model.result(*model.running.values())
    assert set(model.ended) == set(queries)
    model.result(lost)  # it had answered after all; too late
    model.drain()


def test_a_lost_task_is_left_to_the_code() -> None:
    model = coded(3)
    first, second, third = model.submit(3)
    model.kill(model.worker(model.data(first)[0]))
    assert not model.data(first)
    model.result(*model.parities(), *model.data(second), *model.data(third))
    model.decoded(first)
    assert model.ended[first] == AnswerDecoded(first)
    model.drain()


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
    model.drain()


def test_a_lost_task_of_an_open_group_is_sent_again_at_once() -> None:
    model = coded(3)
    (query,) = model.submit()
    (lost,) = model.data(query)
    model.kill(model.worker(lost))
    (again,) = model.data(query)
    assert again != lost
    model.drain()


def test_a_lost_parity_is_sent_again_but_not_for_ever() -> None:
    model = coded(2, spare=PARITY_RETRIES, max_losses=100)
    model.submit(2)
    for _ in range(PARITY_RETRIES):
        model.fail(*model.parities())
        assert len(model.parities()) == 1
    model.fail(*model.parities())
    assert not model.parities()
    model.drain()


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
    model.drain()


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
    assert model.ended[first] == Answer(first, again)
    model.drain()


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
    model.drain()


def test_a_lost_member_is_sent_again_when_its_parity_is_given_up() -> None:
    model = coded(2, spare=PARITY_RETRIES + 1)
    first, _ = model.submit(2)
    model.fail(*model.data(first))
    for _ in range(PARITY_RETRIES + 1):
        assert not model.data(first)
        model.fail(*model.parities())
    assert len(model.data(first)) == 1
    model.drain()


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
    model.drain()


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
    model.drain()


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
    model.drain()


def test_a_second_report_of_a_death_changes_nothing() -> None:
    model = Model("uncoded", 2)
    model.submit(2)
    lost = model.running[0]
    model.kill(0)
    model.new()
    model.do(model.scheduler.worker_lost(0.0, 0, "again"))
    model.fail(lost)
    assert model.new() == []
    model.drain()


def test_the_deadline_ends_a_query_and_drops_its_queued_task() -> None:
    model = Model("uncoded", 1, hang_timeout=100.0)
    first, second = model.submit(), model.submit(timeout=1.0)
    model.wait(1)
    assert model.ended == {second[0]: Fail(second[0], DEADLINE)}
    model.result(*model.data(first[0]))
    assert not model.running
    model.drain()


def guessing(policy: str = "coded", **rules: Any) -> tuple[Model, list[int]]:
    """Return a model with a group of four of which the parity and one member are here."""
    model = Model(policy, 5, ErasureCode(4, guesses=True), hang_timeout=100.0, **rules)
    queries = model.submit(3, timeout=1.0) + model.submit(timeout=1.0)
    model.result(*model.parities(), *model.data(queries[0]))
    return model, queries[1:]


@pytest.mark.parametrize("policy", ["coded", "coded+hedge"])
def test_what_nothing_determines_is_guessed_at_the_deadline(policy: str) -> None:
    model, missing = guessing(policy)
    model.wait(0.9)
    assert not model.decoding, "a better answer may come"
    model.wait(0.1)
    assert model.decoding == missing
    for query in missing:
        model.decoded(query, sure=False)
        assert model.ended[query] == AnswerDecoded(query)
    model.drain()


def late_guesses() -> tuple[Model, list[int]]:
    """Return a model with a group of three that are late when they take 19 ms."""
    code = ErasureCode(3, guesses=True)
    model = hedging("coded+guess", workers=4, code=code, hang_timeout=100.0)
    return model, model.submit(3)


def test_late_queries_are_guessed_when_the_parity_is_here() -> None:
    model, queries = late_guesses()
    model.result(*model.parities(), *model.data(queries[0]))
    model.wait(0.015)
    assert not model.decoding, "not late yet"
    model.wait(0.005)
    assert model.decoding == queries[1:]
    model.decoded(queries[1], sure=False)
    assert model.ended[queries[1]] == AnswerDecoded(queries[1])
    assert model.scheduler.hedges == 0
    model.drain()


def test_late_queries_are_guessed_when_the_parity_comes() -> None:
    model, queries = late_guesses()
    model.result(*model.data(queries[0]))
    model.wait(0.05)
    assert not model.decoding
    model.result(*model.parities())
    assert model.decoding == queries[1:]
    model.drain()


def test_one_that_is_determined_is_not_guessed() -> None:
    model, queries = late_guesses()
    model.result(*model.data(queries[0]), *model.data(queries[1]))
    model.wait(0.05)
    model.new()
    model.result(*model.parities())
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {queries[2]: 2}
    assert not decode.guess
    model.drain()


def test_an_output_overtakes_a_guess() -> None:
    model, missing = guessing()
    model.wait(1)
    (late,) = model.data(missing[0])
    model.result(late)
    assert model.ended == {**model.ended, missing[0]: Answer(missing[0], late)}
    assert model.decoding == missing
    model.drain()


def test_a_guess_that_takes_too_long_is_not_waited_for() -> None:
    model, missing = guessing()
    model.wait(1 + OVERTIME)
    assert {model.ended[query] for query in missing} == {Fail(q, DEADLINE) for q in missing}
    model.drain()


def test_what_is_decoded_at_the_deadline_is_waited_for_a_little() -> None:
    model = coded(2, hang_timeout=100.0)
    first, second = model.submit(2, timeout=1.0)
    model.result(*model.parities(), *model.data(first))
    assert model.decoding == [second]
    model.wait(1.1)
    model.decoded(second)
    assert model.ended[second] == AnswerDecoded(second)
    model.drain()


def test_a_guess_after_losses_has_until_the_deadline() -> None:
    model, missing = guessing(max_losses=1)
    model.fail(*(attempt for query in missing for attempt in model.data(query)))
    query = model.decoding[0]
    model.wait(0.9)
    assert query not in model.ended
    model.wait(0.1 + OVERTIME)
    assert model.ended[query] == Fail(query, DEADLINE)
    model.drain()


def test_guesses_of_a_group_are_made_together() -> None:
    model, missing = guessing()
    model.new()
    model.wait(1)
    (decode,) = only(model.new(), Decode)
    assert (decode.guess, list(decode.wanted)) == (True, missing)
    model.drain()


def test_after_a_guess_the_others_have_their_hope_again() -> None:
    """The task of a guessed member is dropped from a queue: another had counted on its output."""
    model = Model("coded", 4, ErasureCode(3, guesses=True), hang_timeout=100.0)
    (hasty,) = model.submit(timeout=2 * PATIENCE)
    other, third = model.submit(2)
    model.result(*model.parities(), *model.data(third))
    model.submit(2)  # the two workers that are free have something to do
    model.kill(model.worker(*model.data(hasty)))
    model.wait(1.5 * PATIENCE)  # it is sent again, behind them
    model.kill(model.worker(*model.data(other)))
    assert not model.scheduler.queries[other].attempts
    model.wait(0.5 * PATIENCE)
    assert model.decoding == [hasty]
    model.decoded(hasty)
    assert model.ended[hasty] == AnswerDecoded(hasty)
    assert model.scheduler.queries[other].attempts
    model.drain()


def test_nothing_is_guessed_without_a_parity_or_for_who_does_not_want_it() -> None:
    for accept, parity in ((True, False), (False, True)):
        model = Model("coded", 4, ErasureCode(3, guesses=True), hang_timeout=100.0)
        queries = model.submit(3, timeout=1.0, accept=accept)
        if parity:
            model.result(*model.parities())
        model.wait(1)
        assert model.ended == {query: Fail(query, DEADLINE) for query in queries}
        model.drain()


def test_what_workers_keep_failing_on_is_guessed() -> None:
    model, missing = guessing(max_losses=2)
    model.fail(*(attempt for query in missing for attempt in model.data(query)))
    assert not model.decoding
    while pending := [attempt for query in missing for attempt in model.data(query)]:
        model.fail(pending[0])
    assert sorted(model.decoding) == missing
    for query in missing:
        model.decoded(query)
        assert model.ended[query] == AnswerDecoded(query)
    model.drain()


def test_a_late_output_of_a_failed_query_still_serves_its_group() -> None:
    model = coded(2, hang_timeout=100.0)
    (hasty,), (patient,) = model.submit(timeout=1.0), model.submit()
    model.fail(*model.data(patient))
    model.wait(1)
    assert set(model.ended) == {hasty}
    model.result(*model.data(hasty), *model.parities())
    assert model.decoding == [patient]
    model.drain()


def test_a_failed_query_takes_no_hope_from_its_group() -> None:
    """Its queued task is dropped with it, and another member had counted on that output."""
    model = coded(2, hang_timeout=100.0, routing="round-robin")
    model.submit(2)  # all three workers are at work
    (hasty,) = model.submit(timeout=1.0)
    (patient,) = model.submit()
    (attempt,) = model.scheduler.queries[patient].attempts
    model.result(model.running[model.scheduler.attempts[attempt].worker])
    assert model.data(patient) == [attempt]
    assert not model.data(hasty)
    model.fail(attempt)
    model.wait(1)
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
    model.drain()


def test_a_query_that_kills_its_workers_is_given_up() -> None:
    model = Model("uncoded", 3, max_losses=3)
    (query,) = model.submit()
    for _ in range(3):
        (attempt,) = model.data(query)
        worker = model.worker(attempt)
        model.kill(worker)
        model.up(worker)
    assert model.ended[query] == Fail(query, "lost 3 times: killed")
    model.drain()


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
    model.drain()


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
        assert model.scheduler.sent == work
        model.drain()


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
    model.drain()


def test_what_a_worker_is_at_is_finished_and_forgotten() -> None:
    model = Model("uncoded", 1)
    (query,) = model.submit()
    (attempt,) = model.data(query)
    model.cancel(query)
    assert model.new() == [Send(0, attempt, 0, (query,), 1)]
    model.result(attempt)
    assert model.new() == [Forget((attempt,), (query,))]
    model.drain()


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
    model.drain()


def test_a_cancelled_query_is_not_copied() -> None:
    model = hedging()
    (query,) = model.submit()
    model.cancel(query)
    model.new()
    model.wait(1)
    assert not only(model.new(), Send)
    assert model.scheduler.hedges == 0
    model.drain()


def test_a_cancelled_querys_copy_is_dropped_from_the_queue() -> None:
    model = hedging("coded+hedge", workers=3, code=ErasureCode(2))
    queries = model.submit(2)
    model.wait(0.03)
    assert model.scheduler.hedges == model.scheduler.waiting == 2
    model.cancel(queries[0])
    (left,) = [a for a in model.scheduler.attempts.values() if a.started is None]
    assert left.query is not None
    assert left.query.identity == queries[1]
    model.drain()


def busy(k: int, policy: str = "coded", **rules: Any) -> Model:
    """Return a coding model whose k + 1 workers are at queries that nobody waits for."""
    model = coded(k, policy=policy, hang_timeout=100.0, **rules)
    model.submit(k)
    model.cancel(*model.asked)
    assert len(model.running) == k + 1
    model.new()
    return model


def own(model: Model, query: int) -> list[Attempt]:
    """Return the attempts of a query's data task, queued or not."""
    return [model.scheduler.attempts[a] for a in sorted(model.scheduler.queries[query].attempts)]


def parity(model: Model, query: int) -> Attempt:
    """Return the attempt of the parity task of a query's group, queued or not."""
    group = model.scheduler.queries[query].group
    (attempt,) = [a for a in model.scheduler.attempts.values() if a.group is group and not a.query]
    return attempt


def reach(model: Model, *attempts: Attempt) -> None:
    """Let workers finish what is before these attempts, the oldest first."""
    for attempt in attempts:
        while attempt.started is None:
            model.result(next(a for a, i in model.at.items() if attempt.worker in (NOBODY, i)))


def finish(model: Model, *attempts: Attempt) -> None:
    """Let workers finish these attempts, and what is before them."""
    for attempt in attempts:
        reach(model, attempt)
        model.result(attempt.identity)


def test_of_a_sealed_group_all_is_dropped_when_all_are_cancelled() -> None:
    model = busy(2)
    queries = model.submit(2)
    assert (sum(model.loads) + model.scheduler.waiting) == 6
    model.cancel(*queries)
    assert (sum(model.loads) + model.scheduler.waiting) == 3
    assert only(model.new(), Forget) == [Forget((), tuple(queries))]
    model.drain()


def test_the_output_of_a_cancelled_member_still_decodes_its_group() -> None:
    model = coded(2, hang_timeout=100.0)
    gone, slow = model.submit(2)
    model.cancel(gone)
    model.result(*model.data(gone), *model.parities())
    assert model.decoding == [slow]
    model.decoded(slow)
    model.drain()


def test_a_cancelled_member_that_its_sealed_group_may_need_is_computed() -> None:
    """No parity makes up for a slow one without it."""
    model = busy(2)
    gone, slow = model.submit(2)
    (task,) = own(model, gone)
    model.cancel(gone)
    finish(model, task, parity(model, slow))
    assert model.decoding == [slow]
    model.drain()


def test_it_is_not_computed_when_nobody_of_its_group_waits_any_more() -> None:
    model = busy(2)
    gone, quick = model.submit(2)
    model.cancel(gone)
    finish(model, *own(model, quick))
    sent = model.scheduler.sent
    model.drain()
    assert model.scheduler.sent == sent


def test_it_moves_with_its_group_when_its_worker_dies() -> None:
    model = busy(2, routing="round-robin")
    gone, slow = model.submit(2)
    (task,) = own(model, gone)
    model.cancel(gone)
    before = task.worker
    model.kill(before)
    assert task.worker != before
    assert task.identity in model.scheduler.binding.workers[task.worker].line
    assert slow not in model.ended
    model.drain()


def test_a_cancelled_member_that_is_lost_lets_nobody_wait() -> None:
    model = coded(2, spare=1, hang_timeout=100.0)
    gone, lost = model.submit(2)
    model.cancel(gone)
    model.fail(*model.data(lost))
    assert not model.data(lost)  # it hopes for the other member's output
    model.new()
    model.fail(*model.data(gone))
    assert [send.members for send in only(model.new(), Send)] == [(lost,)]
    model.drain()


def test_one_that_no_worker_was_given_leaves_its_open_group() -> None:
    model = busy(3, routing="round-robin")
    first, gone = model.submit(2)
    model.cancel(gone)
    assert model.new() == [Forget((), (gone,))]
    others = model.submit(2)
    tasks = [task for query in (first, *others) for task in own(model, query)]
    tasks.append(parity(model, first))
    assert tasks[-1].group.members == [first, *others]
    assert len({task.worker for task in tasks}) == 4, "the worker that it leaves is free again"
    finish(model, *tasks[1:])
    assert model.decoding == [first]
    model.drain()


def test_those_behind_one_that_leaves_are_decoded_under_their_new_numbers() -> None:
    model = busy(3, routing="round-robin")
    gone, second = model.submit(2)
    finish(model, *own(model, second))
    model.cancel(gone)
    third, fourth = model.submit(2)
    model.new()
    finish(model, *own(model, third), parity(model, fourth))
    (decode,) = only(model.new(), Decode)
    assert decode.wanted == {fourth: 2}
    model.drain()


def test_a_copy_of_an_answered_member_moves_up_with_it() -> None:
    model = busy(3, "coded+hedge", hedge_share=0.8, group_timeout=1.0, routing="round-robin")
    know_times(model)
    gone, second = model.submit(2)
    reach(model, *own(model, second))
    model.wait(0.02)
    original, copy = own(model, second)
    reach(model, copy)
    assert all(attempt.started is None for attempt in own(model, gone))
    model.result(original.identity)
    model.cancel(gone)
    model.submit(2)
    model.new()
    model.result(copy.identity)
    assert Forget((copy.identity,)) in model.new(), "it is nobody else's output"
    model.drain()


def test_one_that_a_worker_is_at_stays_in_its_open_group() -> None:
    model = coded(3)
    gone, slow = model.submit(2)
    model.cancel(gone)
    (third,) = model.submit()
    assert parity(model, slow).group.members == [gone, slow, third]
    model.result(*model.data(gone), *model.data(third), *model.parities())
    assert model.decoding == [slow]
    model.drain()


def test_after_the_timeout_the_cancelled_are_not_coded() -> None:
    model = coded(4, spare=1)
    first, gone, third = model.submit(3)
    model.cancel(gone)
    model.new()
    model.wait(0.021)
    (send,) = only(model.new(), Send)
    assert send.members == (first, third)
    model.drain()


def test_a_code_without_direct_answers_computes_nothing_of_who_left_in_time() -> None:
    model = Model("coded", 5, ErasureCode(3, 2, systematic=False))
    gone, stays = model.submit(2)
    model.cancel(gone)
    model.wait(0.021)
    assert {send.members for send in only(model.new(), Send)} == {(stays,)}
    model.cancel(*model.submit(2))
    model.wait(0.021)
    assert not only(model.new(), Send)
    model.drain()


def test_a_group_that_nobody_is_left_in_is_no_more() -> None:
    model = busy(3)
    gone = model.submit(2)
    model.wait(0.015)
    model.cancel(*gone)
    assert only(model.new(), Forget)[-2:] == [Forget((), (query,)) for query in gone]
    assert model.scheduler.open_group is None
    late = model.submit(2)  # with a time of its own
    model.wait(0.015)
    assert model.scheduler.open_group is not None
    model.wait(0.006)
    assert model.scheduler.open_group is None
    assert parity(model, late[0]).group.members == late
    model.drain()


# Another policy


def test_the_open_group_ends_by_the_code_that_it_began_with() -> None:
    model = coded(3)
    lost, other = model.submit(2)
    model.change("hedge")
    assert model.scheduler.code.k == 1
    (parity_task,) = model.parities()
    model.kill(model.worker(*model.data(lost)))
    model.result(*model.data(other), parity_task)
    model.decoded(lost)
    assert isinstance(model.ended[lost], AnswerDecoded)
    (single,) = model.submit()
    assert [send.size for send in only(model.new(), Send)][-1] == 1
    model.result(*model.data(single))
    model.drain()


def test_what_is_late_already_is_copied_under_a_policy_with_copies() -> None:
    model = Model("uncoded", workers=3, hedge_share=1.0)
    know_times(model)
    (query,) = model.submit()
    model.wait(0.1)
    assert len(model.data(query)) == 1
    model.change("hedge")
    model.wait(0.0)
    assert len(model.data(query)) == 2
    model.drain()


def test_nothing_is_copied_under_a_policy_without_copies() -> None:
    model = Model("hedge", workers=3, hedge_share=1.0)
    know_times(model)
    (query,) = model.submit()
    model.change("uncoded")
    model.wait(0.1)
    assert len(model.data(query)) == 1
    model.change("hedge")
    model.wait(0.0)
    assert len(model.data(query)) == 2
    model.drain()


@pytest.mark.parametrize(
    ("policy", "workers", "code", "wanted"),
    [
        ("hedge", 4, None, "coded"),
        ("uncoded", 1, None, "replicate"),
        ("uncoded", 3, ErasureCode(3), "coded"),
        ("coded", 4, ErasureCode(2, 2, systematic=False), "uncoded"),
    ],
)
def test_a_policy_that_cannot_be_changes_nothing(
    policy: str, workers: int, code: ErasureCode | None, wanted: str
) -> None:
    model = Model(policy, workers, code)
    model.submit()
    assert not model.change(wanted)
    assert model.scheduler.chosen.name == policy
    model.drain()


# Every order of everything

SETUPS: list[tuple[str, int, CodeRules | None]] = [
    ("uncoded", 1, None),
    ("uncoded", 3, None),
    ("replicate", 2, None),
    ("replicate", 4, None),
    ("hedge", 1, None),
    ("hedge", 3, None),
    ("coded", 3, ErasureCode(2)),
    ("coded", 6, ErasureCode(3)),
    ("coded", 5, ErasureCode(3, 2)),
    ("coded", 4, ErasureCode(3, fixed_size=True)),
    ("coded", 4, ErasureCode(2, 2, systematic=False)),
    ("coded", 5, ErasureCode(3, 1, fixed_size=True, systematic=False)),
    ("coded+hedge", 3, ErasureCode(2)),
    ("coded+hedge", 6, ErasureCode(4)),
    ("coded+hedge", 6, ErasureCode(3, 2, fixed_size=True)),
    ("coded+hedge", 4, ErasureCode(3, 1, systematic=False)),
    ("coded", 4, ErasureCode(3, guesses=True)),
    ("coded", 5, ErasureCode(4, fixed_size=True, guesses=True)),
    ("coded+hedge", 5, ErasureCode(4, guesses=True)),
    ("coded", 3, ErasureCode(3, backup=True)),
    ("coded+hedge", 4, ErasureCode(2, backup=True)),
    ("auto", 3, ErasureCode(2, backup=True)),
    ("coded+guess", 6, ErasureCode(4, guesses=True)),
    ("coded+guess", 4, ErasureCode(3, fixed_size=True, guesses=True)),
    ("coded+guess", 4, ErasureCode(3)),
    ("coded", 6, AnswersAll(4, r=2)),
    ("coded+hedge", 7, AnswersAll(4, r=3)),
    ("uncoded", 4, ErasureCode(3)),
    ("hedge", 5, ErasureCode(4, guesses=True)),
    ("auto", 3, None),
    ("auto", 4, ErasureCode(3)),
    ("auto", 6, ErasureCode(3, 2)),
    ("auto", 4, AnswersAll(3)),
    ("auto", 3, AnswersAll(2)),
]

EVENTS = st.tuples(
    st.sampled_from(
        ["submit"] * 3
        + ["result"] * 5
        + ["decoded", "unsure", "fail", "kill", "up", "release", "wait", "oversleep", "late"]
        + ["cancel", "change"]
    ),
    st.integers(0, 11),
)
WAITS = (0.001, 0.005, 0.01, 0.03, 0.06, 0.2, 0.5, 1.0, 2.0, 3.1, 4.0, 7.0)


def happen(model: Model, event: str, n: int) -> None:
    """Let something happen, if it can."""
    pending = [*model.at, *model.held]
    if event == "submit":
        model.offer((1, 1, 2, 3)[n % 4], (1e6, 1e6, 0.04, 1.0)[n // 3 % 4], accept=n % 5 != 4)
    elif event == "result" and pending:
        model.result(pending[n % len(pending)])
    elif event == "release" and model.at:
        model.release(list(model.at)[n % len(model.at)])
    elif event == "fail" and pending:
        model.fail(pending[n % len(pending)])
    elif event == "kill" and len(model.down) < model.rules.workers:
        up = sorted(set(range(model.rules.workers)) - model.down)
        model.kill(up[n % len(up)])
    elif event == "up" and model.down:
        model.up(sorted(model.down)[n % len(model.down)])
    elif event in ("decoded", "unsure") and model.decoding:
        model.decoded(model.decoding[n % len(model.decoding)], event == "decoded")
    elif event == "cancel":  # one, or a few at once, of which some may be over
        queries = list(model.asked)[-(n + 1) :]
        model.cancel(*queries[: 1 + n % 3])
    elif event == "change":
        model.change(list(POLICIES)[n % len(POLICIES)])
    elif event == "wait":
        model.wait(WAITS[n])
    elif event == "oversleep":
        model.oversleep(WAITS[n])
    elif event == "late" and model.lost:
        attempt = model.lost[n % len(model.lost)]
        model.new()
        (model.fail if n % 3 == 0 else model.result)(attempt)
        assert model.new() == [], "it was given up long ago"


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    setup=st.sampled_from(SETUPS),
    timed=st.booleans(),
    round_robin=st.booleans(),
    slots=st.sampled_from([1, 1, 2, 3]),
    worker_batch=st.sampled_from([1, 1, 2, 3]),
    slow=st.sampled_from([1.0, 1.0, 3.0]),
    max_losses=st.sampled_from([1, 3, 5]),
    extra=st.sampled_from([None, None, 0.0, 0.3, 1.0]),
    events=st.lists(EVENTS, min_size=20, max_size=100),
)
def test_every_query_ends_once_whatever_happens(
    setup: tuple[str, int, CodeRules | None],
    timed: bool,
    round_robin: bool,
    slots: int,
    worker_batch: int,
    slow: float,
    max_losses: int,
    extra: float | None,
    events: list[tuple[str, int]],
) -> None:
    policy, workers, code = setup
    model = Model(
        policy,
        workers,
        code,
        routing="round-robin" if round_robin else "least-loaded",
        max_losses=max_losses,
        max_pending=20,
        hedge_share=0.8,
        extra=extra,
        slots=slots,
        worker_batch=1 if round_robin or slots > 1 else worker_batch,
    )
    if timed:
        know_times(model, slow)
    with patch("codedinvnet.serving.rules.auto.LOOK", 3):
        for event, n in events:
            happen(model, event, n)
        model.drain()
