"""The driver: order, events that come meanwhile, and actions that cannot be carried out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from codedinvnet.driver import Driver
from codedinvnet.scheduler.actions import Answer, Decided, Send
from codedinvnet.scheduler.events import Completed, Event, Submit, TimerDue
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules


class Notes:
    """A front end without workers: it notes what it is asked for."""

    def __init__(self, workers: int = 1, policy: str = "uncoded") -> None:
        self.scheduler = Scheduler(Rules(workers, POLICIES[policy]))
        self.driver = Driver(self.scheduler, self)
        self.noted: list[Any] = []
        self.timer: float | None = None
        self.depth = 0
        self.answers_at_once = self.raises = False

    def feed(self, *events: Event) -> list[Any]:
        for event in events:
            self.driver.feed(0.0, event)
        noted, self.noted = self.noted, []
        return noted

    def begin(self, sends: Sequence[Send]) -> None:
        assert not self.depth, "it was entered again"
        if self.raises:
            raise MemoryError("no room")
        self.depth += 1
        self.noted += [("begin", *send.members) for send in sends]
        if self.answers_at_once:
            for send in sends:
                self.driver.feed(0.0, Completed(send.attempt))
        self.depth -= 1

    def answer(self, answer: Answer) -> None:
        self.noted.append(("answer", answer.query))

    def fail(self, query: int, reason: str) -> None:
        self.noted.append(("fail", query, reason))

    def replace(self, worker: int, reason: str) -> None:
        self.noted.append(("replace", worker))

    def forget(self, attempts: Sequence[int], queries: Sequence[int]) -> None:
        """Notes nothing."""

    def decided(self, decided: Decided) -> None:
        """Notes nothing."""

    def copy_refused(self, query: int, held_out: bool) -> None:
        """Notes nothing."""

    def set_timer(self, at: float | None) -> None:
        self.timer = at

    def broken(self, error: Exception) -> str:
        return str(error)


def test_tasks_begin_before_answers_are_given() -> None:
    notes = Notes()
    assert notes.feed(Submit((1, 2), 9.0)) == [("begin", 1)]
    (attempt,) = (number for number in range(10) if notes.scheduler.is_at(0, number))
    assert notes.feed(Completed(attempt)) == [("begin", 2), ("answer", 1)]
    assert notes.timer is not None


def test_an_event_that_comes_meanwhile_waits_for_its_turn() -> None:
    notes = Notes(workers=2)
    notes.answers_at_once = True
    begun = notes.feed(Submit((1, 2, 3, 4), 9.0))
    assert [event for event in begun if event[0] == "answer"] == [
        ("answer", n) for n in (1, 2, 3, 4)
    ]
    assert begun[:2] == [("begin", 1), ("begin", 2)]
    assert notes.feed(TimerDue()) == []


def test_a_task_that_cannot_begin_ends_its_query() -> None:
    notes = Notes()
    notes.raises = True
    assert notes.feed(Submit((1, 2), 9.0)) == [("fail", 1, "no room"), ("fail", 2, "no room")]
    notes.raises = False
    assert notes.feed(Submit((3,), 9.0)) == [("begin", 3)]


def test_an_unknown_action_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    class Preempt(NamedTuple):
        worker: int

    def give_up(error: Exception) -> str:
        raise error

    notes = Notes()
    monkeypatch.setattr(notes.scheduler, "handle", lambda *_: [Preempt(0)])
    monkeypatch.setattr(notes, "broken", give_up)
    with pytest.raises(AssertionError, match="Preempt"):
        notes.feed(TimerDue())
