"""Copies: of late queries, and of answers that are not sure or are withheld."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from codedinvnet.scheduler.actions import Answer, Forget, Send
from codedinvnet.scheduler.policies import POLICIES, Launch, Policy, Sender, Then
from codedinvnet.scheduler.queries import Attempt
from tests.scheduler.model import ErasureCode, Model
from tests.scheduler.situations import hedging

# Copies


def test_replicate_sends_two_copies_to_two_workers_and_takes_the_first() -> None:
    model = Model("replicate", 3)
    (query,) = model.submit()
    one, other = model.data(query)
    assert model.worker(one) != model.worker(other)
    model.result(other)
    assert model.ended[query] == Answer(query, other, model.worker(other))
    model.new()
    model.result(one)
    assert Forget((one,)) in model.new()


@dataclass(frozen=True)
class Own(Policy):
    """A policy of a user's own: it copies a late query once."""

    title: ClassVar[str] = "own"

    def begun(self, sender: Sender, attempt: Attempt) -> None:
        sender.watch(attempt)

    def late(self, sender: Sender, attempt: Attempt, again: bool, runs: bool) -> Then:
        query = attempt.query
        if query is not None and not query.copies:
            sender.launch(Launch(query.group, query.member, query, urgent=True, hedge=True))
        return Then.DONE


def test_a_policy_of_your_own_sees_late_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "own", Own())
    model = hedging("own")
    (query,) = model.submit()
    model.wait(0.0205)
    assert len(model.data(query)) == 1
    model.wait(0.001)
    assert len(model.data(query)) == 2


def test_a_copy_leaves_when_a_task_has_run_for_longer_than_most() -> None:
    model = hedging()
    (query,) = model.submit()
    (first,) = model.data(query)
    model.wait(0.0205)
    assert model.data(query) == [first]
    model.wait(0.001)
    _, copy = model.data(query)
    assert model.worker(copy) != model.worker(first)
    assert model.scheduler.dispatcher.hedges == 1
    model.wait(1)
    assert model.data(query) == [first, copy]
    model.result(copy)
    assert model.ended[query] == Answer(query, copy, model.worker(copy))


@pytest.mark.parametrize("how", ["failed", "died"])
def test_a_lost_copy_is_followed_by_another_at_once(how: str) -> None:
    model = hedging(workers=3)
    (query,) = model.submit()
    model.wait(0.0215)
    first, copy = model.data(query)
    if how == "failed":
        model.fail(copy)
    else:
        model.kill(model.worker(copy))
    _, again = model.data(query)
    assert len({model.worker(attempt) for attempt in (first, copy, again)}) == 3
    assert model.scheduler.dispatcher.hedges == 2
    model.result(again)
    assert model.ended[query] == Answer(query, again, model.worker(again))


def test_hedges_are_paid_from_a_bucket() -> None:
    model = hedging(workers=40, hedge_share=0.1)  # 2 copies saved up
    queries = model.submit(20)  # and 2 more
    model.wait(0.05)
    copied = [query for query in queries if len(model.data(query)) == 2]
    assert copied == queries[:4]
    assert model.scheduler.budget.tokens < 1


# Decodings that are withheld


def withheld(policy: str, **options: Any) -> tuple[Model, int]:
    """Return a model in which a member's decoded answer was withheld, and the member."""
    settings = {"workers": 4, "code": ErasureCode(2), "hedge_share": 1.0, **options}
    model = Model(policy, **settings)
    first, second = model.submit(2, timeout=5.0)
    model.result(*model.parities(), *model.data(first))
    model.new()
    model.withheld(second)
    return model, second


@pytest.mark.parametrize("lost", [False, True])
def test_a_withheld_decoding_waits_for_the_direct_answer(lost: bool) -> None:
    model, query = withheld("coded", hang_timeout=100.0)
    model.fail(*model.data(query)[:lost])
    (own,) = model.data(query)
    assert query not in model.ended
    model.result(own)
    assert model.ended[query] == Answer(query, own, model.worker(own))


def test_a_withheld_decoding_is_copied_where_copies_are_sent() -> None:
    model, query = withheld("coded+hedge")
    own, copy = model.data(query)
    assert [type(action) for action in model.new()] == [Send]
    model.fail(own)
    assert query not in model.ended
    model.result(copy)
    assert model.ended[query] == Answer(query, copy, model.worker(copy))
