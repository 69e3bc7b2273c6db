"""The driver: feeds events to the scheduler, and has its actions carried out.

The gateway, the service and the simulator share it. Each brings what differs: how it starts a task,
answers a query and sets a timer. Events that come while actions are carried out wait for their
turn, so that nothing is entered twice.

A front end and a scheduler know of each other only what passes here, so that a wire fits between
them:

- events in, actions out: named tuples of integers, floats, truth values, strings, None, and tuples
  of these;
- `next_timer`, a time, which whoever has the scheduler waits for;
- `snapshot`, for pages, metrics and admission. It may be out of date.

The front end numbers the queries, and the scheduler the attempts; no number is used twice. Both
number the workers from 0. An action may meet a query or an attempt that is over by then: it is
ignored, and a `Send` is answered by `Failed`. So is an event that comes too late by the scheduler.
Times are of one clock: `now` and `Submit.deadline` are what a wire between two machines translates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, assert_never

from codedinvnet.scheduler.actions import (
    Action,
    Answer,
    AnswerDecoded,
    Call,
    Compare,
    CopyRefused,
    Decided,
    Decode,
    Fail,
    Forget,
    Replace,
    Send,
    Snapshot,
)
from codedinvnet.scheduler.events import Event, Failed, Gone


class Decides(Protocol):
    """A scheduler, or what stands for one."""

    def handle(self, now: float, event: Event) -> list[Action]:
        """Take an event, and return what to do about it."""

    def next_timer(self) -> float | None:
        """Return when `TimerDue` is wanted next."""

    def snapshot(self) -> Snapshot:
        """Return what pages, metrics and admission show; it may be out of date."""


class FrontEnd(Protocol):
    """Has queries and workers."""

    def begin(self, sends: Sequence[Send]) -> None:
        """Give a worker a task, or several that it computes at once."""

    def answer(self, answer: Answer) -> None:
        """Answer a query from an attempt's output."""

    def fail(self, query: int, reason: str) -> None:
        """End a query with an error, unless it has ended."""

    def copy_refused(self, query: int, held_out: bool) -> None:
        """Count a late query that is held out, or whose copy the budget doesn't pay for."""

    def replace(self, worker: int, reason: str) -> None:
        """End a worker, and start another in its place; `WorkerUp` follows."""

    def forget(self, attempts: Sequence[int], queries: Sequence[int]) -> None:
        """Let go of attempts' outputs and of queries: nothing will ask for them."""

    def decided(self, decided: Decided) -> None:
        """Report what is done about late answers from now on."""

    def set_timer(self, at: float | None) -> None:
        """Feed `TimerDue` at this time; an earlier one will do."""

    def broken(self, error: Exception) -> str:
        """Log what an action raised and return it in words, or raise it again."""


class DecodingFrontEnd(FrontEnd, Protocol):
    """Can also compute answers of coded groups."""

    def decode(self, decode: Decode) -> None:
        """Compute answers from other outputs; `Decoded` or `Withheld` follows for each."""

    def answer_decoded(self, query: int) -> None:
        """Answer a query with what was decoded for it."""

    def compare(self, compare: Compare) -> None:
        """Compare approximate and direct answers of a group that is complete."""


class Driver:
    """Drives a scheduler.

    Args:
        scheduler: decides.
        front_end: carries out.
        decoding: the same, if it has coded groups.
    """

    def __init__(
        self, scheduler: Decides, front_end: FrontEnd, decoding: DecodingFrontEnd | None = None
    ) -> None:
        self._scheduler, self._front_end, self._decoding = scheduler, front_end, decoding
        self._events: deque[tuple[float, Event]] = deque()
        self._works = False

    def feed(self, now: float, event: Event) -> None:
        """Handle an event, now or after those that are being handled."""
        self._events.append((now, event))
        if self._works:
            return
        self._works = True
        try:
            while self._events:
                at, next_event = self._events.popleft()
                self._carry_out_all(at, self._scheduler.handle(at, next_event))
        finally:
            self._works = False
        self.look()

    def snapshot(self) -> Snapshot:
        """Return what pages, metrics and admission show of the scheduler."""
        return self._scheduler.snapshot()

    def look(self) -> None:
        """Set the timer; done again now and then, it makes up for one that was lost."""
        self._front_end.set_timer(self._scheduler.next_timer())

    def _carry_out_all(self, now: float, actions: Sequence[Action]) -> None:
        """Carry actions out: tasks start before answers leave, as workers wait."""
        if len(actions) > 1:
            actions = sorted(actions, key=_comes_later)
        for action in actions:
            try:
                self._carry_out(action)
            except Exception as error:
                self._give_up(now, action, self._front_end.broken(error))

    def _carry_out(self, action: Action) -> None:
        front_end = self._front_end
        match action:
            case Send():
                front_end.begin((action,))
            case Answer():
                front_end.answer(action)
            case Forget():
                front_end.forget(action.attempts, action.queries)
            case Call():
                front_end.begin(action.sends)
            case Decode() | AnswerDecoded() | Compare():
                self._for_group(action)
            case Fail():
                front_end.fail(action.query, action.reason)
            case CopyRefused():
                front_end.copy_refused(action.query, action.held_out)
            case Replace():
                front_end.replace(action.worker, action.reason)
            case Decided():
                front_end.decided(action)
            case _:
                assert_never(action)

    def _for_group(self, action: Decode | AnswerDecoded | Compare) -> None:
        front_end = self._decoding
        if front_end is None:
            raise TypeError(f"this front end has no codes, and {action} is of one")
        match action:
            case Decode():
                front_end.decode(action)
            case AnswerDecoded():
                front_end.answer_decoded(action.query)
            case Compare():
                front_end.compare(action)
            case _:
                assert_never(action)

    def _give_up(self, now: float, action: Action, reason: str) -> None:
        """End the queries of an action that could not be carried out."""
        sends: tuple[Send, ...] = ()
        match action:
            case Decode():
                queries = tuple(query for query, _ in action.wanted)
            case Answer() | AnswerDecoded() | Fail():
                queries = (action.query,)
            case Send() | Call():
                sends = action.sends if isinstance(action, Call) else (action,)
                queries = tuple(send.members[0] for send in sends if not send.group_size)
            case _:
                return
        for query in queries:
            self._front_end.fail(query, reason)
        if queries:
            self._events.append((now, Gone(queries)))
        self._events.extend((now, Failed(send.attempt, reason)) for send in sends)


def _comes_later(action: Action) -> bool:
    return not isinstance(action, Send | Call)
