"""Whom a group's outputs answer, and what is sent again for those who have no hope left.

The middle of the rules, between `sending` and `scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence

from codedinvnet.scheduler.actions import (
    DEADLINE,
    Action,
    AnswerDecoded,
    Decode,
    Fail,
)
from codedinvnet.scheduler.group import CodingGroup
from codedinvnet.scheduler.sending import Sending
from codedinvnet.scheduler.tasks import Query, State

OVERTIME = 0.5
"""Seconds beyond its deadline for which what is being decoded for a query is waited for."""


class Settling(Sending):
    """How the queries of a group end."""

    def _settle(self, now: float, group: CodingGroup) -> None:
        """Decode what can be decoded, and send again what has no hope left."""
        waiting = [
            query
            for identity in group.members
            if (query := self.queries.get(identity)) is not None and query.state is State.WAITING
        ]
        if not waiting:
            return
        if self._determines(group):
            determined = group.determined()
            wanted = {}
            for query in waiting:
                if query.member in determined and query.accept_decoded and not query.fallback:
                    query.state = State.DECODING
                    wanted[query.identity] = query.member
            if wanted:
                outputs = dict(group.outputs)
                self._actions.append(Decode(group.identity, group.size, outputs, wanted))
            self._guess([query for query in waiting if query.late])
        stranded = [q for q in waiting if q.state is State.WAITING and not q.attempts]
        hopeful = group.hopeful() if stranded and not group.is_open else frozenset()
        for query in stranded:
            if not group.is_open and query.member in hopeful and query.accept_decoded:
                if query.fallback:
                    self._accept_decoded(query)
                continue
            if self.systematic:
                self._send_data(now, query, first=True)
            elif not group.is_open:
                for task in group.missing():
                    self._dispatch(now, group, task, first=True)
                break

    def _determines(self, group: CodingGroup) -> bool:
        """Tell whether outputs may determine members that have no answer of their own."""
        return not group.is_open and (group.has_extra or not self.systematic)

    def _guess(self, queries: Sequence[Query]) -> None:
        """Let those of a group's queries be guessed that wait for anything and can be."""
        wanted = {}
        for query in queries:
            waiting = query.state is State.WAITING and query.accept_decoded and not query.fallback
            if waiting and query.group.guessable():
                query.state, query.last = State.DECODING, True
                wanted[query.identity] = query.member
        if wanted:
            group = queries[0].group
            outputs = dict(group.outputs)
            self._actions.append(Decode(group.identity, group.size, outputs, wanted, guess=True))

    def _time_over(self, now: float, query: Query) -> None:
        """End a query at its deadline, or wait a little for what is decoded, or guessed, for it."""
        if not query.overtime:
            members = [self.queries[m] for m in query.group.members if m in self.queries]
            self._guess([q for q in members if q.deadline <= now])  # together: that costs no more
        if query.overtime or query.state is State.WAITING:
            self._give_up(query, DEADLINE)
        else:
            query.overtime = query.last = True
            self.timers.set(now + OVERTIME, "deadline", query.identity)

    def _give_up(self, query: Query, reason: str) -> None:
        """End a query: with a decoded answer of low confidence, if there is one, or an error."""
        if query.fallback:
            self._accept_decoded(query)
        else:
            self._end(query, Fail(query.identity, reason))

    def _accept_decoded(self, query: Query) -> None:
        self._end(query, AnswerDecoded(query.identity))

    def _end(self, query: Query, action: Action) -> None:
        """Answer or fail a query, once, and drop what is queued for it."""
        self._actions.append(action)
        self._finish(query)

    def _finish(self, query: Query) -> None:
        """Strike a query off, and drop what is queued for it."""
        query.state = State.DONE
        del self.queries[query.identity]
        group = query.group
        group.pending -= 1
        if not group.pending:
            self._drop_queued(a for attempts in group.live.values() for a in attempts)
        elif not group.is_open and group.code.r > 1:  # extra tasks may be of some members alone
            extra = [a for task, found in group.live.items() if task >= group.code.k for a in found]
            self._drop_queued(extra)
        self._drop_queued(query.attempts)
        self._close_if_over(group)
