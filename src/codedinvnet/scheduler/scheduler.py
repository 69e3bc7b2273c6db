"""The front end's rules: who is answered when, what is sent again, and what is forgotten.

A deterministic state machine. Events come in as method calls with the time `now` in seconds, what
is to be done comes out as actions, and `next_timer` says when to call `on_timer`. The front end
carries the actions out on real workers, the simulator on imagined ones. Which worker takes which
task is said in `binding`, when a copy is sent in `hedging`, what a group determines in `group`,
who is answered by it in `settling`, and what becomes of a task on its way in `sending`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from codedinvnet.codes.rules import CodeRules, is_systematic
from codedinvnet.exhaustive import assert_never
from codedinvnet.scheduler.actions import (
    DEADLINE,
    Action,
    Answer,
    Complete,
    Forget,
    Replace,
)
from codedinvnet.scheduler.group import FILLER, CodingGroup
from codedinvnet.scheduler.hedging import yields
from codedinvnet.scheduler.recent import Recent
from codedinvnet.scheduler.sending import code_for
from codedinvnet.scheduler.settings import Policy, Rules
from codedinvnet.scheduler.settling import Settling
from codedinvnet.scheduler.tasks import Attempt, Query, State

GUESS_QUANTILE = 0.95
"""A query that takes longer than this share of recent ones may be guessed."""
PARITY_RETRIES = 2
"""A group's lost parity tasks are sent again so often."""
PATIENCE = 0.1
"""Seconds that a lost query hopes to be decoded; then it is sent again. What it waits for may be on
a worker that hangs."""


class Scheduler(Settling):
    """The rules.

    Args:
        rules: see `Rules`.
        code: the rules of a code; unused by policies without one.

    Raises:
        ValueError: if the policy needs a code and there is none, there are too few workers, or
            `worker_batch` goes with several slots.
    """

    def __init__(self, rules: Rules, code: CodeRules | None = None) -> None:
        super().__init__(rules, code)
        self.latencies = Recent(GUESS_QUANTILE)
        self._recheck: float | None = None
        """When tasks that a slow worker passed by are to be looked at again."""

    # Events

    def submit(
        self, now: float, count: int, deadline: float, accept_decoded: bool = True, bulk: int = 0
    ) -> tuple[list[int], list[Action]] | None:
        """Take the queries of one request; None if there are too many already.

        Whole groups are filled from the request itself; the rest joins the open group.

        Args:
            now: the time.
            count: how many.
            deadline: when they are guessed or fail, absolute.
            accept_decoded: whether a decoded answer will do.
            bulk: how large each is, see `Query`.

        Returns:
            The queries' numbers and what to do.
        """
        if len(self.queries) + count > self.rules.max_pending:
            return None
        numbers: list[int] = []
        self._look(now, count)
        k = self.code.k if self.policy.coded else 1
        for start in range(0, count, k):
            size = min(k, count - start)
            group = self._new_group() if size == k else None
            for _ in range(size):
                target = group or self._joinable(now)
                numbers.append(self._add(now, deadline, accept_decoded, bulk, target))
                if group is None and target.is_full:
                    self.open_group = None
                    self._seal(now, target)
            if group is not None:
                self._seal(now, group)
        return numbers, self._flush(now)

    def released(self, now: float, worker: int, attempt: int) -> list[Action]:
        """A worker has done an attempt's work; its answer may still be on the way."""
        found = self.attempts.get(attempt)
        if found is not None and found.worker == worker:
            self._release(now, found)
        return self._flush(now)

    def result(self, now: float, attempt: int, is_usual: bool = True) -> list[Action]:
        """An attempt's output is here.

        Args:
            now: the time.
            attempt: its number.
            is_usual: whether its time tells how long such tasks take.
        """
        found = self.attempts.pop(attempt, None)
        if found is not None:
            self._release(now, found, is_usual)
            self._result(now, found, is_usual)
        return self._flush(now)

    def failed(self, now: float, attempt: int, reason: str, final: bool = False) -> list[Action]:
        """An attempt raised on its worker, or its answer was lost on the way.

        Args:
            now: the time.
            attempt: its number.
            reason: why.
            final: whether its query ends by that, unless something is under way that may answer it.
        """
        found = self.attempts.get(attempt)
        if found is not None:
            found.group.failed.add(found.worker)
            self.binding.release(found)
            self._lose(now, found, reason, final)
        return self._flush(now)

    def late(self, now: float, attempt: int) -> list[Action]:
        """An attempt takes so long that something is to be done about it, if the policy does."""
        self._late(now, attempt)
        return self._flush(now)

    def worker_lost(self, now: float, worker: int, reason: str) -> list[Action]:
        """A worker is dead: its tasks are lost, and it is to be replaced."""
        self._lose_worker(now, worker, reason)
        return self._flush(now)

    def worker_up(self, now: float, worker: int) -> list[Action]:
        """A worker is ready again."""
        self.binding.restore(worker)
        return self._flush(now)

    def decoded(self, now: float, query: int, confident: bool) -> list[Action]:
        """The logits that a `Decode` asked for are here."""
        found = self.queries.get(query)
        if found is not None and found.state is State.DECODING:
            if confident or found.last or not self.policy.hedged:
                self._accept_decoded(found)
                if found.group.identity in self.groups:
                    self._settle(now, found.group)  # after a guess, others may have lost a hope
            else:
                found.state, found.fallback = State.WAITING, True
                if len(found.attempts) < 2 and not self._copy(now, found):
                    self._accept_decoded(found)
        return self._flush(now)

    def withheld(self, now: float, query: int) -> list[Action]:
        """What was decoded for a query is none, or may not be released: its own alone will do.

        It waits for the task that it has, with a copy if the policy sends some, or gets another
        first in line.
        """
        found = self.queries.get(query)
        if found is not None and found.state is State.DECODING:
            found.state, found.accept_decoded, found.fallback = State.WAITING, False, False
            if found.overtime:
                self._give_up(found, DEADLINE)
                self._settle(now, found.group)
            elif not found.attempts:
                self._send_data(now, found, first=True)
            elif len(found.attempts) > 1 or not self.policy.hedged or not self._copy(now, found):
                self._copy_again(now, found)
        return self._flush(now)

    def cancel(self, queries: Iterable[int]) -> list[Action]:
        """Nobody waits for these queries any more; those that are over are passed by."""
        for identity in queries:
            if (query := self.queries.get(identity)) is not None:
                self._cancel(query)
        actions, self._actions = self._actions, []
        return actions

    def change_policy(self, now: float, policy: Policy) -> list[Action]:
        """Go on by another policy; no query is lost.

        The open group is coded as if its time had come, and groups end by the code that they began
        with. Copies of late queries are the new policy's for all.

        Raises:
            ValueError: if the policy does not go with the code or the workers; nothing is changed.
        """
        code = code_for(policy, self.rules.workers, self.offered, self.rules.backups)
        if is_systematic(code) != self.systematic:
            raise ValueError(f"without direct answers the code goes with {self.chosen.name} only")
        if self.open_group is not None:
            self._group_timeout(now, self.open_group.identity)
        self._go_by(policy, code)
        for attempt in self.attempts.values():
            if attempt.query is not None and attempt.started is not None:
                self._watch(attempt.started, attempt)
        return self._flush(now)

    def next_timer(self) -> float | None:
        """Return when `on_timer` wants to be called next."""
        return self.timers.next()

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        while (timer := self.timers.due(now)) is not None:
            kind, identity = timer
            match kind:
                case "group":
                    self._group_timeout(now, identity)
                case "hang":
                    attempt = self.attempts.get(identity)
                    if attempt is not None and self.is_at(attempt.worker, identity):
                        self._lose_worker(now, attempt.worker, "hung")
                case "late" | "waits":
                    self._late(now, identity, runs=kind == "late")
                case "early":
                    self._early(now, identity)
                case "retry":
                    if self.pace.retry(now, identity):
                        self.binding.reorder(identity)
                case "recheck":
                    self._recheck = None
                case "guess" | "resend" | "deadline":
                    if (query := self.queries.get(identity)) is not None:
                        self._due(now, kind, query)
                case _:
                    assert_never(kind)
        return self._flush(now)

    def _due(self, now: float, kind: Literal["guess", "resend", "deadline"], query: Query) -> None:
        """Do what is due for a query that is not over."""
        if kind == "resend":
            if query.state is State.WAITING and not query.attempts:
                self._send_data(now, query, first=True)
            return
        if kind == "guess":
            query.late = True
        else:
            self._time_over(now, query)
        self._settle(now, query.group)  # its dropped task may have been others' hope

    def _flush(self, now: float) -> list[Action]:
        """Let workers begin what waits for them, and return what is to be done."""
        binding = self.binding
        if binding.waiting:
            together: list[Attempt] = []
            while (attempt := binding.take(now)) is not None:
                extra = attempt.extra and not binding.is_apart(attempt)
                if extra and yields(
                    binding.needed, binding.slots_up, self.pace.excess, binding.load
                ):
                    binding.release(attempt)
                    self._drop(attempt)
                    self._settle(now, attempt.group)
                elif self.rules.worker_batch > 1:
                    together.append(attempt)
                else:
                    self._actions.append(self._begin(now, attempt))
            if self.rules.worker_batch > 1:  # though all that was taken may have yielded
                self._begin_calls(now, together)
            if (at := binding.recheck) is not None and (
                self._recheck is None or at < self._recheck
            ):
                self._recheck = at
                self.timers.set(at, "recheck", 0)
        actions, self._actions = self._actions, []
        return actions

    # Queries and groups

    def _new_group(self) -> CodingGroup:
        group = CodingGroup(self._next(), self.code)
        self.groups[group.identity] = group
        return group

    def _joinable(self, now: float) -> CodingGroup:
        if self.open_group is None:
            self.open_group = self._new_group()
            if self.code.k > 1:
                self.timers.set(now + self.rules.group_timeout, "group", self.open_group.identity)
        return self.open_group

    def _add(self, now: float, deadline: float, accept: bool, bulk: int, group: CodingGroup) -> int:
        identity = self._next()
        query = Query(identity, accept, deadline, group, group.join(identity, bulk), bulk)
        self.queries[identity] = query
        self.timers.set(deadline, "deadline", identity)
        self.budget.earn()
        if self.systematic:
            self._send_data(now, query)
            for _ in range(1, self.policy.copies):
                self._send_extra(now, group, query.member, query)
        if self.policy.guessing and self.latencies.quantiles:
            self.timers.set(now + self.latencies.quantiles[0], "guess", identity)
        return identity

    def _seal(self, now: float, group: CodingGroup) -> None:
        for task in group.seal():
            if not self.systematic:
                self._dispatch(now, group, task)
            elif task >= group.code.k and self._backs_all and self._is_wanted(group, task):
                self._send_extra(now, group, task)
        if group.code.k == 1:
            return
        if self.auto is not None and self.policy.coded:
            self.auto.sealed(group.size / group.code.k)
        self._settle(now, group)

    def _group_timeout(self, now: float, identity: int) -> None:
        group = self.groups.get(identity)
        if group is None or not group.is_open:
            return
        if group is self.open_group:
            self.open_group = None
        if not self.systematic:
            self._seal(now, group)
            return
        late = [self.queries[q] for q in group.members if q in self.queries]
        self._forget(group, [q for q in group.members if q not in self.queries])
        group.keep([query.identity for query in late])
        for member, query in enumerate(late):
            query.member = member
        if len(late) > 1 or (late and (self.rules.backups or not self.policy.coded)):
            self._seal(now, group)
            return
        group.uncode()
        for query in late:  # a group of one is plainly copied
            self._send_extra(now, group, query.member, query)
        self._close_if_over(group)

    def _cancel(self, query: Query) -> None:
        """Strike a query off that nobody waits for, at no loss to the others of its group.

        What a worker is at goes on. If none was given the query, it leaves its group while that
        is open; once sealed, the group may be decoded only with its output, so that one of its
        tasks stays queued for as long as another member waits.
        """
        group = query.group
        attempts = list(query.attempts.values())
        unsent = all(attempt.started is None for attempt in attempts)
        if attempts and unsent and not group.is_open:
            attempts[0].shared = True
        self._finish(query)
        if unsent and group.is_open:
            self._leave(query)

    # Outputs and losses

    def _result(self, now: float, attempt: Attempt, is_usual: bool) -> None:
        identity, query, group = attempt.identity, attempt.query, attempt.group
        if query is not None:
            query.attempts.pop(identity, None)
            if attempt.started is not None and is_usual:
                seconds = now - attempt.started
                self.pace.answered(attempt.worker, seconds, attempt.kind, attempt.bulk)
            if self.policy.guessing and is_usual:
                self.latencies.add(now - attempt.queued)
            if query.identity not in group.members:
                self._actions.append(Forget((identity,)))
                return
        first = group.arrived(attempt.number, identity)
        if first:
            self.computed_by[identity] = attempt.worker
            if group.is_complete and group.code.r:
                workers = {t: self.computed_by[a] for t, a in group.outputs.items() if a != FILLER}
                outputs = dict(group.outputs)
                self._actions.append(Complete(group.identity, group.size, outputs, workers))
        if query is not None and query.state is not State.DONE:
            self._end(query, Answer(query.identity, identity, attempt.worker))
        if not first:
            self._actions.append(Forget((identity,)))
        if group.identity in self.groups:
            if self._determines(group):
                self._settle(now, group)
            self._close_if_over(group)

    def _lose(self, now: float, attempt: Attempt, reason: str, final: bool = False) -> None:
        """An attempt will never answer; see `failed`."""
        self.attempts.pop(attempt.identity, None)
        query, group = attempt.query, attempt.group
        group.lost(attempt.number, attempt.identity)
        if query is not None:
            query.attempts.pop(attempt.identity, None)
            if self.policy.rescued:
                self._rescue(now, attempt)
            self._blame(query, reason, final)
        elif not self.systematic:
            hopeful = group.hopeful()  # what the code makes up for is nobody's loss
            for query in [self.queries[m] for m in group.members if m in self.queries]:
                if query.member not in hopeful:
                    self._blame(query, reason)
        elif self._needed(attempt) and group.retries < PARITY_RETRIES:
            group.retries += 1
            self._send_extra(now, group, attempt.task, first=True, urgent=not attempt.extra)
        self._settle(now, group)
        if query is not None and query.attempts:
            self._copy_again(now, query)
        elif query is not None and query.state is State.WAITING:
            self.timers.set(now + PATIENCE, "resend", query.identity)
        self._close_if_over(group)

    def _blame(self, query: Query, reason: str, final: bool = False) -> None:
        """Count a loss; a query that workers keep failing on is given up, or at once if told so."""
        query.losses += 1
        over = final or query.losses >= self.rules.max_losses
        if query.state is not State.WAITING or not over:
            return
        group = query.group
        hopeful = query.accept_decoded and not group.is_open and query.member in group.hopeful()
        if query.attempts or hopeful:
            return
        self._guess([query])
        if query.state is State.WAITING:
            self._give_up(query, reason if final else f"lost {query.losses} times: {reason}")

    def _lose_worker(self, now: float, index: int, reason: str) -> None:
        if not self.is_up(index):
            return
        self._actions.append(Replace(index, reason))
        for attempt in self.binding.lose(index):
            self._lose(now, attempt, reason)
