"""How queries end: by their own answer, a decoded one, or an error.

Here is also what becomes of outputs that arrive and of attempts that are lost, and what is sent
again for queries that have no hope left.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from codedinvnet.scheduler.actions import (
    DEADLINE,
    Action,
    Answer,
    AnswerDecoded,
    Compare,
    Decode,
    Fail,
    Forget,
    Replace,
)
from codedinvnet.scheduler.dispatch import Dispatcher
from codedinvnet.scheduler.group import FILLER, CodingGroup
from codedinvnet.scheduler.policies import Launch
from codedinvnet.scheduler.queries import Attempt, Query, State


class Completion:
    """Ends queries.

    Args:
        dispatcher: sends tasks, and knows all that is in flight.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._on = dispatcher
        self._flying, self._tuning = dispatcher.flying, dispatcher.rules.tuning

    def flush(self) -> list[Action]:
        """Let workers begin what waits for them, and return what is to be done."""
        for group in self._on.assign():
            self.settle(group)  # its dropped task may have been a hope
        actions, self._on.actions = self._on.actions, []
        return actions

    def settle(self, group: CodingGroup) -> None:
        """Decode what can be decoded, and send again what has no hope left."""
        waiting = [query for query in self._flying.pending(group) if query.is_waiting]
        if not waiting:
            return
        if self._determines(group):
            determined = group.determined()
            able = [q for q in waiting if q.member in determined and q.wants_decoded]
            self._decode(able)
        stranded = [query for query in waiting if query.is_waiting and not query.attempts]
        hopeful = group.hopeful() if stranded and not group.is_open else frozenset()
        for query in stranded:
            if query.fallback is not None or (query.takes_decoded and query.member in hopeful):
                continue
            if self._on.systematic:
                self._on.send_own(query, first=True)
            elif not group.is_open:
                for task in group.missing():
                    self._on.send(group, task, first=True)
                break

    def _determines(self, group: CodingGroup) -> bool:
        """Return whether outputs may determine members that have no answer of their own."""
        return not group.is_open and (group.has_extra or not self._on.systematic)

    def _decode(self, queries: Sequence[Query], guess: bool = False) -> None:
        """Let some queries of one group be decoded."""
        if queries:
            for query in queries:
                query.state = State.DECODING
            group = queries[0].group
            wanted = tuple((query.identity, query.member) for query in queries)
            outputs = tuple(group.outputs.items())
            self._on.actions.append(Decode(group.identity, group.size, outputs, wanted, guess))

    def _guess(self, queries: Sequence[Query]) -> None:
        """Guess the answers to those of a group's queries that wait and can have a guess."""
        able = [query for query in queries if query.wants_decoded and query.group.guessable()]
        self._decode(able, guess=True)

    def time_over(self, query: Query) -> None:
        """End a query at its deadline, or wait a little for what is being decoded for it."""
        if query.state is not State.GRACE:
            pending = self._flying.pending(query.group)
            over = [each for each in pending if each.deadline <= self._on.now]
            self._guess(over)  # together: that costs no more
        if query.state is State.DECODING:
            query.state = State.GRACE
            self._on.timers.set(self._on.now + self._tuning.grace, "deadline", query.identity)
        else:
            self._end(query, Fail(query.identity, DEADLINE))
        self.settle(query.group)  # its dropped task may have been a hope

    def decoded(self, query: Query) -> None:
        """Answer a query with what was decoded for it."""
        self._end(query, AnswerDecoded(query.identity))
        if query.group.identity in self._flying.groups:
            self.settle(query.group)  # after a guess, others may have lost a hope

    def withheld(self, query: Query) -> None:
        """Let a query wait for its own answer."""
        over = query.state is State.GRACE
        query.state, query.takes_decoded = State.WAITING, False
        if over:
            self._end(query, Fail(query.identity, DEADLINE))
            self.settle(query.group)
        elif not query.attempts:
            self._on.send_own(query, first=True)
        else:
            self._on.policy.withheld(self._on, query)

    def _end(self, query: Query, action: Action) -> None:
        self._on.actions.append(action)
        self._finish(query)

    def _finish(self, query: Query) -> None:
        """Strike a query off, and drop what is queued for it."""
        query.state = State.DONE
        del self._flying.queries[query.identity]
        group, drop = query.group, self._on.drop_queued
        group.pending -= 1
        if not group.pending:
            drop(a for attempts in group.live.values() for a in attempts)
        elif not group.is_open and group.code.r > 1:  # some extra tasks may need few members
            drop([a for task, found in group.live.items() if task >= group.code.k for a in found])
        drop(query.attempts)
        if query.fallback is not None:
            drop([query.fallback])
        self._on.close_if_over(group)

    def cancel(self, query: Query) -> None:
        """Strike off a query whose client is gone, at no loss to the others of its group.

        What a worker is at goes on. A query that no worker has begun leaves its group while that is
        open. Once sealed, the group may need the query's output to be decoded, so that one of its
        tasks stays queued for as long as another member waits.
        """
        group, attempts = query.group, list(query.attempts.values())
        unsent = all(attempt.started is None for attempt in attempts)
        if attempts and unsent and not group.is_open:
            attempts[0].shared = True
        self._finish(query)
        if unsent and group.is_open:
            self._on.actions.append(Forget((), (query.identity,)))
            self._flying.leave(query)

    # Outputs and losses

    def arrived(self, attempt: Attempt, is_usual: bool) -> None:
        """Use an attempt's output."""
        identity, query, group, on = attempt.identity, attempt.query, attempt.group, self._on
        if query is not None and attempt.fallback:
            self._fallback_answered(attempt, query)
            return
        if query is not None:
            query.attempts.pop(identity, None)
            on.note_race(attempt)
            if is_usual:
                on.note_answer(attempt)
            if query.identity not in group.members:
                on.actions.append(Forget((identity,)))
                return
        first = group.arrived(attempt.number, identity)
        if first and attempt.worker is not None:
            computed_by = self._flying.computed_by
            computed_by[identity] = attempt.worker
            if group.is_complete and group.code.r:
                outputs = tuple(group.outputs.items())
                workers = tuple((task, computed_by[a]) for task, a in outputs if a != FILLER)
                on.actions.append(Compare(group.identity, group.size, outputs, workers))
        if query is not None and query.state is not State.DONE and attempt.worker is not None:
            query.answered = on.now
            query.won_at = attempt.level if attempt.hedge else None
            self._end(query, Answer(query.identity, identity, attempt.worker))
        if not first:
            on.actions.append(Forget((identity,)))
        if group.identity in self._flying.groups:
            if self._determines(group):
                self.settle(group)
            on.close_if_over(group)

    def _fallback_answered(self, attempt: Attempt, query: Query) -> None:
        query.fallback = None
        if query.is_pending and attempt.worker is not None:
            self._end(query, Answer(query.identity, attempt.identity, attempt.worker))
        self._on.actions.append(Forget((attempt.identity,)))

    def _fallback_lost(self, query: Query) -> None:
        query.fallback = None
        if query.is_waiting and not query.attempts:
            self._on.send_own(query, first=True)

    def lost(
        self, attempt: Attempt, reason: str, final: bool = False, unsent: bool = False
    ) -> None:
        """Do without an attempt that will never answer; see `Scheduler.failed`."""
        on, query, group = self._on, attempt.query, attempt.group
        self._flying.attempts.pop(attempt.identity, None)
        if query is not None and attempt.fallback:
            self._fallback_lost(query)
            return
        group.lost(attempt.number, attempt.identity)
        if query is not None:
            query.attempts.pop(attempt.identity, None)
            on.note_race(attempt, lost=True)
            on.policy.lost(on, attempt)
            over = final or not (query.repeatable or unsent)
            self._record_loss(query, reason, over)
        elif not on.systematic:
            hopeful = group.hopeful()  # the code makes up for these
            for each in list(self._flying.pending(group)):
                if each.member not in hopeful:
                    self._record_loss(each, reason)
        elif self._flying.is_needed(attempt) and group.retries < self._tuning.extra_retries:
            group.retries += 1
            on.launch(Launch(group, attempt.task, first=True, urgent=not attempt.extra))
        self.settle(group)
        if query is not None and query.attempts:
            on.policy.weakened(on, query)
        elif query is not None and query.is_waiting:
            on.timers.set(on.now + self._tuning.patience, "resend", query.identity)
        on.close_if_over(group)

    def _record_loss(self, query: Query, reason: str, final: bool = False) -> None:
        """Count a loss; give up a query that workers keep failing on, or at once if it is final."""
        query.losses += 1
        if not query.is_waiting or not (final or query.losses >= self._on.rules.max_losses):
            return
        group = query.group
        hopeful = query.takes_decoded and not group.is_open and query.member in group.hopeful()
        if query.attempts or query.fallback is not None or hopeful:
            return
        self._guess([query])
        if query.is_waiting:
            why = reason if final else f"lost {query.losses} times: {reason}"
            self._end(query, Fail(query.identity, why))

    def worker_lost(self, worker: int, reason: str, unsent: Container[int] = ()) -> None:
        """Do without a worker, and have it replaced; see `Scheduler.worker_lost`."""
        if worker in self._on.assigner.up:
            self._on.actions.append(Replace(worker, reason))
            for attempt in self._on.assigner.lose(worker):
                if attempt.identity in self._flying.attempts:  # otherwise it has answered
                    self.lost(attempt, reason, unsent=attempt.identity in unsent)
