"""What `auto` does, with what it has at hand."""

from __future__ import annotations

import pytest

from codedinvnet.codes.rules import AnswersAll, Parities
from codedinvnet.scheduler.actions import AnswerDecoded, Decided, Decode, Seen, Send
from codedinvnet.scheduler.policies import CODED, HEDGE
from codedinvnet.scheduler.policies.auto import Decider
from codedinvnet.scheduler.tuning import TUNING, Tuning
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import know_times

LATE = 0.02
"""Later than tasks of 10 to 15 ms normally are."""


def seen(excess: float, load: float = 0.4) -> Seen:
    return Seen(normal=0.015, excess=excess, load=load, fill=1.0, extra=0.05)


@pytest.mark.parametrize("code", [Parities(10), AnswersAll(2, cost=lambda size: 1.0)])
def test_with_a_costly_code_it_codes_while_stragglers_cost_much(code: Parities) -> None:
    auto = Decider(code)
    assert auto.policy == HEDGE
    wanted = [
        (0.9 * TUNING.codes_from, HEDGE),
        (1.1 * TUNING.codes_from, CODED | HEDGE),
        (0.6 * TUNING.codes_from, CODED | HEDGE),
        (0.4 * TUNING.codes_from, HEDGE),
        (0.9 * TUNING.codes_from, HEDGE),
    ]
    for excess, policy in wanted:
        decision = auto.decide(1.0, seen(excess))
        assert decision.policy == policy.name
        assert decision.seen.excess == excess


def rescuing(workers: int = 4) -> Model:
    model = Model("auto", workers, AnswersAll(3), extra=2.0)
    know_times(model)
    return model


def test_a_late_query_is_rescued_and_then_copied() -> None:
    model = rescuing()
    (query,) = model.submit()
    own = model.new()
    assert [send.task for send in only(own, Send)] == [0]
    model.wait(LATE)
    (send,) = only(model.new(), Send)
    assert (send.task, send.members, send.size) == (3, (query,), 1)
    model.wait(LATE)
    (send,) = only(model.new(), Send)
    assert (send.task, send.members) == (0, (query,))


def test_a_rescued_query_is_answered_by_what_is_here_first() -> None:
    model = rescuing()
    first, second = model.submit(2)
    model.wait(LATE)
    backups = model.parities()
    assert len(backups) == 2
    model.new()
    model.result(backups[0])
    (decode,) = only(model.new(), Decode)
    ((rescued, _),) = decode.wanted
    model.decoded(rescued)
    assert isinstance(model.ended[rescued], AnswerDecoded)
    other = second if rescued == first else first
    model.result(*model.data(other))
    assert not isinstance(model.ended[other], AnswerDecoded)


def test_who_wants_direct_answers_gets_a_copy_in_place_of_a_rescue() -> None:
    model = rescuing()
    (query,) = model.submit(accept=False)
    model.new()
    model.wait(LATE)
    (send,) = only(model.new(), Send)
    assert (send.task, send.members) == (0, (query,))


def test_it_begins_to_code_when_stragglers_come() -> None:
    model = Model("auto", 5, ErasureCode(3), extra=1.0, tuning=Tuning(auto_looks=3))
    know_times(model)
    assert model.scheduler.dispatcher.decision is None
    model.scheduler.stats.overhead = 0.0
    model.submit(3)
    assert len(model.at) == 3
    model.result(*list(model.at))
    (decided,) = only(model.new(), Decided)
    assert decided.policy == HEDGE.name
    for worker in range(5):
        for _ in range(30):
            model.scheduler.stats.answered(worker, 0.5)
    model.submit(3)
    (decided,) = only(model.new(), Decided)
    assert model.scheduler.dispatcher.decision == decided
    assert decided.policy == (CODED | HEDGE).name
    assert decided.seen.excess > TUNING.codes_from
    assert len(model.at) == 4  # with a parity


def test_one_budget_binds_copies_and_parities() -> None:
    model = Model("coded+hedge", 40, ErasureCode(2), extra=0.5)
    know_times(model)
    for _ in range(4):
        model.submit(2)
    assert len(model.parities()) == 3  # one leaves no reserve
    model.wait(LATE)
    copies = [s for s in only(model.new(), Send) if s.task < 2][8:]
    assert len(copies) == 1
    assert model.scheduler.budget.spent == 4
    model.submit(2)
    assert len(model.parities()) == 3
