"""Routes, clamps of the delay, and requests that may not be computed twice or keep their slot."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest

from codedinvnet.scheduler.actions import Action, Answer, CopyRefused, Fail, Replace, Send
from codedinvnet.scheduler.events import Completed, Failed, Released, Submit, TimerDue, WorkerLost
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.tuning import TUNING

FAST, SLOW = 0.01, 0.5
NUMBERS = count()
"""Of queries."""


def service(policy: str = "hedge", workers: int = 6, **rules: Any) -> Scheduler:
    """Return a scheduler that knows the route "fast", whose requests take 10 ms."""
    scheduler = Scheduler(Rules(workers, POLICIES[policy], **{"hedge_share": 1.0, **rules}))
    for i in range(TUNING.times_needed):
        (attempt,) = begin(scheduler, float(i), "fast")
        scheduler.handle(i + FAST, Completed(attempt))
    return scheduler


def begin(scheduler: Scheduler, now: float, route: str, **asked: Any) -> list[int]:
    return sent(scheduler.handle(now, Submit((next(NUMBERS),), now + 60, route=route, **asked)))


def sent(actions: list[Action]) -> list[int]:
    return [action.attempt for action in actions if isinstance(action, Send)]


def copied_at(scheduler: Scheduler, now: float, until: float) -> float | None:
    """Return when the next copy is sent."""
    while (at := scheduler.next_timer()) is not None and at <= until:
        if sent(scheduler.handle(max(now, at), TimerDue())):
            return at - now
    return None


def test_times_are_learned_for_each_route() -> None:
    scheduler = service()
    for i in range(TUNING.times_needed):
        (attempt,) = begin(scheduler, 100.0 + i, "slow")
        assert copied_at(scheduler, 100.0 + i, 100.0 + i + SLOW) is None
        scheduler.handle(100.0 + i + SLOW, Completed(attempt))
    delays = dict(scheduler.snapshot().delays)
    fast, slow = delays["fast"], delays["slow"]
    assert FAST < fast < 2 * FAST < SLOW < slow < 2 * SLOW
    assert "unknown" not in delays
    for now, route, late in ((200.0, "slow", slow), (300.0, "fast", fast)):
        (attempt,) = begin(scheduler, now, route)
        assert copied_at(scheduler, now, now + 1) == pytest.approx(late)
        scheduler.handle(now + 1, Completed(attempt))
    assert scheduler.dispatcher.hedges == 2


@pytest.mark.parametrize(
    ("delay", "route", "late"),
    [
        ((0.1, 1.0), "fast", 0.1), ((0.0, 0.005), "fast", 0.005), ((0.001, 0.2), "unknown", 0.2),
        ((0.001, math.inf), "unknown", None), (None, "unknown", None),
    ],
)  # fmt: skip
def test_the_delay_is_clamped_and_has_a_first_value(
    delay: tuple[float, float] | None, route: str, late: float | None
) -> None:
    scheduler = service(first_delay=0.3)
    begin(scheduler, 200.0, route, delay=delay)
    copied = copied_at(scheduler, 200.0, 202.0)
    assert copied is None if late is None else copied == pytest.approx(late)


@pytest.mark.parametrize("policy", ["hedge", "replicate"])
def test_what_is_not_repeatable_is_sent_once(policy: str) -> None:
    scheduler = service(policy) if policy == "hedge" else Scheduler(Rules(3, POLICIES[policy]))
    (attempt,) = begin(scheduler, 100.0, "fast", repeatable=False)
    assert copied_at(scheduler, 100.0, 100.1) is None or policy != "hedge"
    scheduler.timers.set(100.1, "late", attempt)
    assert sent(scheduler.handle(100.1, TimerDue())) == []
    (again,) = sent(scheduler.handle(100.2, Failed(attempt, "refused", unsent=True)))
    actions = scheduler.handle(100.3, Failed(again, "reset"))
    (end,) = (action for action in actions if isinstance(action, Fail))
    assert end.reason == "reset"
    begin(scheduler, 100.4, "fast", repeatable=False)
    busy = next(i for i in range(scheduler.rules.workers) if scheduler.load(i))
    actions = scheduler.handle(100.5, WorkerLost(busy, "died"))
    assert [type(action) for action in actions[:2]] == [Replace, Fail]


def test_an_answer_may_keep_its_slot() -> None:
    scheduler = Scheduler(Rules(1, POLICIES["hedge"]))
    (stream,) = begin(scheduler, 0.0, "")
    answers = scheduler.handle(0.1, Completed(stream, keeps_slot=True))
    assert isinstance(answers[0], Answer)
    assert begin(scheduler, 0.2, "") == [], "it goes on"
    assert sent(scheduler.handle(0.3, Released(0, stream))) != []
    actions = scheduler.handle(0.4, WorkerLost(0, "died"))
    assert not any(isinstance(action, Fail) for action in actions)


def test_a_query_that_is_held_out_gets_no_copy_but_is_sent_again_when_its_worker_is_lost() -> None:
    scheduler = service(hold_out=1.0)
    (attempt,) = begin(scheduler, 200.0, "fast")
    told: list[Action] = []
    while (at := scheduler.next_timer()) is not None and at <= 201.0:
        told += scheduler.handle(at, TimerDue())
    assert [action.held_out for action in told if isinstance(action, CopyRefused)] == [True]
    assert sent(told) == []
    worker = next(i for i in range(scheduler.rules.workers) if scheduler.is_at(i, attempt))
    assert len(sent(scheduler.handle(201.0, WorkerLost(worker, "died")))) == 1


def test_a_copy_is_marked_and_one_that_the_budget_refuses_is_told() -> None:
    scheduler = service(hedge_share=0.06)
    told: list[Action] = []
    for now in (200.0, 300.0):
        told += scheduler.handle(now, Submit((next(NUMBERS),), now + 60, route="fast"))
        while (at := scheduler.next_timer()) is not None and at <= now + 1:
            told += scheduler.handle(max(now, at), TimerDue())
    assert [action.copy for action in told if isinstance(action, Send)] == [False, True, False]
    assert any(isinstance(action, CopyRefused) for action in told)
