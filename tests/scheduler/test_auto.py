"""What `auto` does, with what it has at hand."""

from __future__ import annotations

from itertools import count

import pytest

from codedinvnet.codes.rules import AnswersAll, CodeRules, Parities, Uncoded
from codedinvnet.scheduler.actions import AnswerDecoded, Decided, Decode, Seen, Send
from codedinvnet.scheduler.auto import Decider, workers_for
from codedinvnet.scheduler.events import Completed, Submit
from codedinvnet.scheduler.policies import AUTO, BACK_LATE, CODED, HEDGE, Policy
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.stats import LatencyStats
from codedinvnet.scheduler.tuning import TUNING, Tuning
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import know_times

LATE = 0.02
"""Later than tasks of 10 to 15 ms normally are."""


JUST_LATE = 0.016
RESCUE_TIME = 0.003
"""What the backup's task of one query takes."""


def know_rescues(model: Model) -> None:
    """Let the rules know how long such tasks take."""
    for _ in range(TUNING.times_needed):
        model.scheduler.stats.took(0.0, 0, 1, RESCUE_TIME)


def seen(excess: float, load: float = 0.4) -> Seen:
    return Seen(normal=0.015, excess=excess, load=load, fill=1.0, extra=0.05)


@pytest.mark.parametrize(
    ("code", "policy"), [(None, HEDGE), (Uncoded(4), HEDGE), (AnswersAll(10), BACK_LATE)]
)
def test_without_a_costly_code_it_copies_or_rescues(code: CodeRules | None, policy: Policy) -> None:
    auto = Decider(code)
    assert auto.policy == policy
    for excess in (0.0, 5.0):
        assert auto.decide(0.0, seen(excess)).policy == policy.name


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


def test_busy_workers_are_not_given_parities() -> None:
    auto = Decider(Parities(10))
    for load, coded in ((0.9, False), (0.51, False), (0.49, True), (0.59, True), (0.61, False)):
        auto.decide(0.0, seen(5 * TUNING.codes_from, load))
        assert auto.policy.coded == coded


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


def test_a_rescue_that_is_late_is_repeated_along_with_a_copy() -> None:
    model = rescuing(workers=5)
    know_rescues(model)
    (query,) = model.submit()
    model.new()
    model.wait(JUST_LATE)
    assert [send.task for send in only(model.new(), Send)] == [3]
    model.wait(2 * RESCUE_TIME)
    sent = only(model.new(), Send)
    assert sorted(send.task for send in sent) == [0, 3]
    assert all(send.members == (query,) for send in sent)
    assert len(set(model.at.values())) == 4
    model.wait(2 * RESCUE_TIME)
    assert not only(model.new(), Send)


def test_a_rescue_in_time_is_not_repeated() -> None:
    model = rescuing()
    know_rescues(model)
    model.submit()
    model.new()
    model.wait(JUST_LATE)
    (rescue,) = model.parities()
    model.new()
    model.wait(0.9 * RESCUE_TIME)
    model.result(rescue)
    model.wait(RESCUE_TIME)
    assert not only(model.new(), Send)


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


def test_the_late_alone_need_no_worker_for_each_task_of_a_group() -> None:
    assert workers_for(AUTO, AnswersAll(10)) == 1
    assert workers_for(AUTO, Uncoded(10)) == 1
    assert workers_for(AUTO, Parities(10)) == workers_for(CODED, AnswersAll(10)) == 11
    model = Model("auto", 2, AnswersAll(10), extra=2.0)
    know_times(model)
    model.submit()
    model.wait(LATE)
    assert len(model.parities()) == 1


def test_what_is_in_time_is_not_rescued() -> None:
    model = rescuing()
    for _ in range(20):
        model.submit()
        model.wait(0.012)
        model.result(*list(model.at))
    assert model.scheduler.dispatcher.sent == 20


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


def test_it_looks_again_after_so_many_queries() -> None:
    auto = Decider(None)
    assert not auto.is_due(TUNING.auto_looks - 1)
    assert auto.is_due(1)
    assert not auto.is_due(1)


def test_the_extra_work_that_it_tells_is_of_the_last_queries() -> None:
    scheduler, numbers = Scheduler(Rules(5, AUTO), ErasureCode(3)), count()
    scheduler.stats.overhead = 0.0

    def serve(queries: int) -> None:
        for _ in range(queries):
            for send in only(scheduler.handle(0.0, Submit((next(numbers),), 1e6)), Send):
                scheduler.handle(0.0, Completed(send.attempt))

    serve(TUNING.auto_looks)
    assert scheduler.dispatcher.decision is not None
    assert all(scheduler.budget.pay(1.0) for _ in range(8))
    serve(3000)
    scheduler.stats.overhead = 2 * TUNING.codes_from
    serve(TUNING.auto_looks)
    assert scheduler.dispatcher.decision.policy == (CODED | HEDGE).name
    assert scheduler.dispatcher.decision.seen.extra < 0.001


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


def test_an_extra_task_costs_what_it_takes() -> None:
    model = Model("coded", 40, AnswersAll(2), extra=1.0)
    know_times(model)
    model.submit(2)
    assert model.scheduler.budget.spent == 1.0  # as the code says
    for worker in range(20):
        model.scheduler.stats.took(0.0, worker, 2, 0.0075)
    model.submit(2)
    assert model.scheduler.budget.spent == 1.5


def test_rescues_are_sent_though_all_that_were_timed_took_long() -> None:
    model = Model("auto", 4, AnswersAll(3), extra=0.2)
    know_times(model)
    pace = model.scheduler.stats
    for worker in [0, 1, 2, 3] * 5:
        pace.took(0.0, worker, 1, 30 * 0.015)
    for _ in range(60):  # the budget is full
        model.submit()
        model.result(*list(model.at))
    spent = model.scheduler.budget.spent
    (query,) = model.submit()
    model.wait(LATE)
    (rescue,) = model.parities()
    assert model.scheduler.budget.spent - spent == 1.0  # as for a copy
    model.result(rescue)
    model.decoded(query)
    for worker in [0, 1, 2, 3] * 25:
        pace.took(0.0, worker, 1, RESCUE_TIME)
    model.result(*list(model.at))
    spent = model.scheduler.budget.spent
    model.submit()
    model.wait(LATE)
    assert model.scheduler.budget.spent - spent == pytest.approx(RESCUE_TIME / 0.015)


def test_what_no_worker_was_given_is_paid_back() -> None:
    model = Model("replicate", 2, extra=2.0)
    (query,) = model.submit()
    first, _ = model.data(query)  # the other keeps its worker
    (query,) = model.submit()
    assert model.scheduler.budget.spent == 2.0
    model.result(first)
    model.result(*model.data(query))
    assert query in model.ended
    assert model.scheduler.budget.spent == 1.0


@pytest.mark.parametrize(("often", "late"), [(20, 0.0105), (10, 0.03)])
def test_a_task_is_late_where_many_straggle(often: int, late: float) -> None:
    """One of `often` takes a second; the others 10 ms."""
    pace = LatencyStats(3)
    for i in range(500):
        pace.took(0.0, i % 3, 0, 1.0 if i % often == often - 1 else 0.01)
    assert pace.late(0, 1) == pytest.approx(late)


def test_a_backups_tasks_take_no_slots_of_the_others() -> None:
    """Neither while they run nor when they end, or are lost."""
    model = Model("coded", 3, ErasureCode(3, backup=True))
    model.submit(3)
    assert model.loads == [1, 1, 1], "the last worker is the backup's"
    binding = model.scheduler.assigner
    assert (binding.running, binding.slots_up, binding.load) == (2, 2, 0.0)
    model.submit()
    assert binding.load == pytest.approx(1 / TUNING.load_memory), "all slots are busy, and no more"
    model.kill(2)
    assert binding.running == 2
    model.drain()
    assert binding.running == 0
