"""The front end's rules: which worker does what, who is answered when, what is sent again.

A deterministic state machine. Events come in as method calls with the time `now` in seconds, what
is to be done comes out as actions, and `next_timer` says when to call `on_timer`. The front end
carries the actions out on real workers, the simulator on imagined ones.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from codedinvnet.codes.rules import Rules as CodeRules
from codedinvnet.codes.rules import Uncoded, is_systematic
from codedinvnet.serving.actions import (
    DEADLINE,
    Action,
    Answer,
    AnswerDecoded,
    Complete,
    Decode,
    Fail,
    Forget,
    Replace,
    Send,
)
from codedinvnet.serving.group import FILLER, CodingGroup
from codedinvnet.serving.order import WorkerOrder
from codedinvnet.serving.rules import Rules

HEDGE_QUANTILE = 0.95
"""A query that takes longer than this share of recent ones is late (Dean & Barroso, "The Tail at
Scale", CACM 2013, hedged requests): a copy is sent, or it is guessed."""
HEDGE_SAMPLES = 20
"""None is late before so many latencies are known."""
BUCKET = 10.0
"""Most copies that may be saved up."""
PARITY_RETRIES = 2
"""A group's lost parity tasks are sent again so often."""
OVERTIME = 0.5
"""Seconds beyond its deadline for which what is being decoded for a query is waited for."""
PATIENCE = 0.1
"""Seconds that a lost query hopes to be decoded; then it is sent again. What it waits for may be on
a worker that hangs."""
FEW_TIMERS = 256
"""As many moot ones are let be."""
NOBODY = -1
"""In place of a worker."""


class State(Enum):
    """Of a query."""

    WAITING = "waiting"
    DECODING = "decoding"
    DONE = "done"


@dataclass
class Query:
    """What is known of a query."""

    identity: int
    accept_decoded: bool
    deadline: float
    group: CodingGroup
    member: int
    state: State = State.WAITING
    attempts: set[int] = field(default_factory=set)
    """Live ones of its own data task."""
    fallback: bool = False
    """A decoded answer of low confidence is at hand."""
    late: bool = False
    """It may be guessed."""
    last: bool = False
    """Whatever is decoded for it is accepted."""
    overtime: bool = False
    """Its deadline has passed."""
    losses: int = 0


@dataclass
class Attempt:
    """One sending of a task."""

    identity: int
    group: CodingGroup
    query: Query | None
    """Of a systematic code's data task; None for every other task."""
    task: int
    worker: int = NOBODY
    queued: float = 0.0
    started: float | None = None
    shared: bool = False
    """Its query was cancelled; it is computed for the others of its group."""


@dataclass
class Worker:
    """What the rules know of a worker."""

    up: bool = True
    running: Attempt | None = None
    queue: deque[Attempt] = field(default_factory=deque)
    turn: int = 0
    """When it was last given a task, for ties."""

    @property
    def load(self) -> int:
        """Tasks it has still to finish."""
        return len(self.queue) + (self.running is not None)


class Scheduler:
    """The rules.

    Args:
        rules: see `Rules`.
        code: the rules of a code; unused by policies without one.

    Raises:
        ValueError: if there is no code, or too few workers for it.
    """

    def __init__(self, rules: Rules, code: CodeRules | None = None) -> None:
        self.rules = rules
        if rules.policy.coded and code is None:
            raise ValueError(f"policy {rules.policy.name} needs a code")
        self.code: CodeRules = code if rules.policy.coded and code is not None else Uncoded()
        self.systematic = is_systematic(self.code)
        needed = max(rules.policy.copies, len(self.code.tasks(self.code.k)))
        if rules.workers < needed:
            raise ValueError(
                f"{rules.workers} are too few: policy {rules.policy.name} with k = {self.code.k} "
                f"needs {needed}, since the tasks of a group go to distinct workers"
            )
        self.workers = [Worker(turn=i - rules.workers) for i in range(rules.workers)]
        self._order = WorkerOrder(rules.workers)
        for i in range(rules.workers):
            self._reorder(i)
        self.queries: dict[int, Query] = {}
        self.attempts: dict[int, Attempt] = {}
        self.unplaced: deque[Attempt] = deque()
        """Tasks for which no worker was up."""
        self.open_group: CodingGroup | None = None
        self.groups: dict[int, CodingGroup] = {}
        self.computed_by: dict[int, int] = {}
        """Attempt -> worker, of the outputs in use."""
        self.latencies: deque[float] = deque(maxlen=1000)
        self.hedge_after: float | None = None
        self.tokens = 0.0
        self.turn = 0
        self.sent = 0
        """Tasks given to workers in all: the work that was done."""
        self.hedges = 0
        self._identity = 0
        self._fresh = 0
        self._timers: list[tuple[float, int, str, int]] = []
        self._kept_timers = 0
        self._actions: list[Action] = []

    # Events

    def submit(
        self, now: float, count: int, deadline: float, accept_decoded: bool = True
    ) -> tuple[list[int], list[Action]] | None:
        """Take the queries of one request; None if there are too many already.

        Whole groups are filled from the request itself; the rest joins the open group.

        Args:
            now: the time.
            count: how many.
            deadline: when they are guessed or fail, absolute.
            accept_decoded: whether a decoded answer will do.

        Returns:
            The queries' numbers and what to do.
        """
        if len(self.queries) + count > self.rules.max_pending:
            return None
        numbers: list[int] = []
        k = self.code.k
        for start in range(0, count, k):
            size = min(k, count - start)
            group = self._new_group() if size == k else None
            for _ in range(size):
                target = group or self._joinable(now)
                numbers.append(self._add(now, deadline, accept_decoded, target))
                if group is None and target.is_full:
                    self.open_group = None
                    self._seal(now, target)
            if group is not None:
                self._seal(now, group)
        return numbers, self._flush()

    def released(self, now: float, worker: int, attempt: int) -> list[Action]:
        """A worker has done an attempt's work; its answer may still be on the way."""
        self._release(worker, attempt)
        self._start(now, worker)
        return self._flush()

    def result(self, now: float, attempt: int) -> list[Action]:
        """An attempt's output is here."""
        found = self.attempts.pop(attempt, None)
        if found is not None:
            self._release(found.worker, attempt)
            self._result(now, found)
            self._start(now, found.worker)  # last: what the output made needless was dropped
        return self._flush()

    def failed(self, now: float, attempt: int, reason: str) -> list[Action]:
        """An attempt raised on its worker, or its answer was lost on the way."""
        found = self.attempts.get(attempt)
        if found is not None:
            found.group.failed.add(found.worker)
            self._release(found.worker, attempt)
            self._lose(now, found, reason)
            self._start(now, found.worker)
        return self._flush()

    def worker_lost(self, now: float, worker: int, reason: str) -> list[Action]:
        """A worker is dead: its task is lost, its queue goes to others, it is to be replaced."""
        self._lose_worker(now, worker, reason)
        return self._flush()

    def worker_up(self, now: float, worker: int) -> list[Action]:
        """A worker is ready again."""
        self.workers[worker].up = True
        self._reorder(worker)
        waiting, self.unplaced = self.unplaced, deque()
        for attempt in waiting:
            if self._needed(attempt):
                self._place(now, attempt)
            else:
                self._drop(attempt)
        self._start(now, worker)
        return self._flush()

    def decoded(self, now: float, query: int, confident: bool) -> list[Action]:
        """The logits that a `Decode` asked for are here."""
        found = self.queries.get(query)
        if found is not None and found.state is State.DECODING:
            if confident or found.last or not self.rules.policy.hedged:
                self._accept_decoded(found)
                if found.group.identity in self.groups:
                    self._settle(now, found.group)  # after a guess, others may have lost a hope
            else:
                found.state, found.fallback = State.WAITING, True
                if not self._hedge(now, found):
                    self._accept_decoded(found)
        return self._flush()

    def cancel(self, queries: Iterable[int]) -> list[Action]:
        """Nobody waits for these queries any more; those that are over are passed by."""
        for identity in queries:
            if (query := self.queries.get(identity)) is not None:
                self._cancel(query)
        return self._flush()

    def next_timer(self) -> float | None:
        """Return when `on_timer` wants to be called next."""
        if len(self._timers) > 2 * self._kept_timers + FEW_TIMERS:
            # Behind a live one moot ones would stay until they are due, which a deadline may make
            # hours.
            self._timers = [timer for timer in self._timers if not self._is_moot(*timer[2:])]
            heapq.heapify(self._timers)
            self._kept_timers = len(self._timers)
        while self._timers and self._is_moot(*self._timers[0][2:]):
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        while self._timers and self._timers[0][0] <= now:
            _, _, kind, identity = heapq.heappop(self._timers)
            if kind == "group":
                self._group_timeout(now, identity)
            elif kind == "hang":
                self._hang_timeout(now, identity)
            elif (query := self.queries.get(identity)) is not None:
                waiting = query.state is State.WAITING
                if kind == "hedge" and waiting:
                    self._hedge(now, query)
                elif kind == "guess":
                    query.late = True
                    self._settle(now, query.group)
                elif kind == "resend" and waiting and not query.attempts:
                    self._send_data(now, query)
                elif kind == "deadline":
                    self._time_over(now, query)
                    self._settle(now, query.group)  # its dropped task may have been others' hope
        return self._flush()

    # Queries and groups

    def _next(self) -> int:
        self._identity += 1
        return self._identity

    def _new_group(self) -> CodingGroup:
        group = CodingGroup(self._next(), self.code)
        self.groups[group.identity] = group
        return group

    def _joinable(self, now: float) -> CodingGroup:
        if self.open_group is None:
            self.open_group = self._new_group()
            if self.code.k > 1:
                self._timer(now + self.rules.group_timeout, "group", self.open_group.identity)
        return self.open_group

    def _add(self, now: float, deadline: float, accept: bool, group: CodingGroup) -> int:
        identity = self._next()
        query = Query(identity, accept, deadline, group, group.join(identity))
        self.queries[identity] = query
        self._timer(deadline, "deadline", identity)
        self.tokens = min(BUCKET, self.tokens + self.rules.hedge_share)
        if self.systematic:
            for _ in range(self.rules.policy.copies):
                self._send_data(now, query)
        if self.hedge_after is not None:
            if self.rules.policy.hedged:
                self._timer(now + self.hedge_after, "hedge", identity)
            if self.rules.policy.guessing:
                self._timer(now + self.hedge_after, "guess", identity)
        return identity

    def _seal(self, now: float, group: CodingGroup) -> None:
        for task in group.seal():
            if not self.systematic or task >= self.code.k:
                self._dispatch(now, Attempt(self._next(), group, None, task))
        if self.code.k == 1:
            return
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
        if len(late) > 1:
            self._seal(now, group)
            return
        group.uncode()
        for query in late:  # a group of one is plainly copied
            self._send_data(now, query)
        self._close_if_over(group)

    def _send_data(self, now: float, query: Query) -> None:
        if not self.systematic:
            return
        attempt = Attempt(self._next(), query.group, query, query.member)
        query.attempts.add(attempt.identity)
        self._dispatch(now, attempt)

    def _hedge(self, now: float, query: Query) -> bool:
        """Send a copy of a late query if the budget allows; return whether one is on its way."""
        if len(query.attempts) > 1:
            return True
        if self.tokens < 1.0 or not self.systematic:
            return False
        self.tokens -= 1.0
        self.hedges += 1
        self._send_data(now, query)
        return True

    def _settle(self, now: float, group: CodingGroup) -> None:
        """Decode what can be decoded, and send again what has no hope left."""
        waiting = [
            query
            for identity in group.members
            if (query := self.queries.get(identity)) is not None and query.state is State.WAITING
        ]
        if not waiting:
            return
        if not group.is_open:
            determined = group.determined()
            wanted = {}
            for query in waiting:
                if query.member in determined and query.accept_decoded and not query.fallback:
                    query.state = State.DECODING
                    wanted[query.identity] = query.member
            if wanted:
                self._actions.append(
                    Decode(group.identity, group.size, dict(group.outputs), wanted)
                )
            self._guess([query for query in waiting if query.late])
        stranded = [q for q in waiting if q.state is State.WAITING and not q.attempts]
        hopeful = group.hopeful() if stranded and not group.is_open else frozenset()
        for query in stranded:
            if not group.is_open and query.member in hopeful and query.accept_decoded:
                if query.fallback:
                    self._accept_decoded(query)
                continue
            if self.systematic:
                self._send_data(now, query)
            elif not group.is_open:
                for task in group.missing():
                    self._dispatch(now, Attempt(self._next(), group, None, task))
                break

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
            self._timer(now + OVERTIME, "deadline", query.identity)

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
        if not any(member in self.queries for member in group.members):
            self._drop_queued(a for attempts in group.live.values() for a in attempts)
        self._drop_queued(query.attempts)
        self._close_if_over(group)

    def _cancel(self, query: Query) -> None:
        """Strike a query off that nobody waits for, at no loss to the others of its group.

        What a worker is at goes on. If none was given the query, it leaves its group while that
        is open; once sealed, the group may be decoded only with its output, so that one of its
        tasks stays queued for as long as another member waits.
        """
        group = query.group
        attempts = [self.attempts[identity] for identity in sorted(query.attempts)]
        unsent = all(attempt.started is None for attempt in attempts)
        if attempts and unsent and not group.is_open:
            attempts[0].shared = True
        self._finish(query)
        if unsent and group.is_open:
            self._leave(query, {attempt.worker for attempt in attempts})

    def _leave(self, query: Query, workers: set[int]) -> None:
        """Take a query out of its open group, where these workers were to compute it."""
        group = query.group
        group.leave(query.identity)
        self._actions.append(Forget((), (query.identity,)))
        if not group.members:
            del self.groups[group.identity]
            self.open_group = None
            return
        live = [self.attempts[a] for attempts in group.live.values() for a in attempts]
        members = [self.queries[m] for m in group.members if m in self.queries]
        members += [a.query for a in live if a.query is not None]  # answered ones' copies, too
        for member in members:
            member.member = group.members.index(member.identity)
        busy = {a.worker for a in live} | {self.computed_by[a] for a in group.outputs.values()}
        group.workers -= workers - busy - group.failed

    def _close_if_over(self, group: CodingGroup) -> None:
        over = group.is_idle and not any(member in self.queries for member in group.members)
        if not over or group.identity not in self.groups or (group.is_open and not group.is_full):
            return
        del self.groups[group.identity]
        self._forget(group, group.members)

    def _forget(self, group: CodingGroup, queries: Sequence[int]) -> None:
        used = tuple(a for a in group.outputs.values() if a != FILLER)
        for attempt in used:
            self.computed_by.pop(attempt, None)
        if used or queries:
            self._actions.append(Forget(used, tuple(queries)))

    # Attempts and workers

    def _needed(self, attempt: Attempt) -> bool:
        if attempt.query is not None and not attempt.shared:
            return attempt.query.state is not State.DONE
        return any(member in self.queries for member in attempt.group.members)

    def _dispatch(self, now: float, attempt: Attempt) -> None:
        self.attempts[attempt.identity] = attempt
        attempt.queued = now
        self._place(now, attempt)

    def _place(self, now: float, attempt: Attempt) -> None:
        group = attempt.group
        chosen = self._choose(attempt)
        if chosen is None:
            attempt.worker = NOBODY
            group.live.setdefault(self._number(attempt), set()).add(attempt.identity)
            self.unplaced.append(attempt)
            return
        worker = self.workers[chosen]
        self.turn += 1
        worker.turn = self.turn
        attempt.worker = chosen
        group.sent(self._number(attempt), attempt.identity, chosen)
        worker.queue.append(attempt)
        self._reorder(chosen)
        self._start(now, chosen)

    def _choose(self, attempt: Attempt) -> int | None:
        """Return the first worker without a task of the group, else a sound one, else any.

        Sound is who is not at this query already and has failed no task of the group. None if no
        worker is up.
        """
        group = attempt.group
        found = self._order.first(group.workers)
        if found is None:
            own = attempt.query.attempts if attempt.query is not None else set()
            busy = {self.attempts[a].worker for a in own if a in self.attempts}
            found = self._order.first(busy | group.failed)
        return self._order.first() if found is None else found

    def _reorder(self, index: int) -> None:
        """Take note that a worker's load, turn or health has changed."""
        worker = self.workers[index]
        load = worker.load if self.rules.routing == "least-loaded" else 0
        self._order.update(index, (load, worker.turn) if worker.up else None)

    def _start(self, now: float, index: int) -> None:
        """Give an idle worker the next task that is still needed."""
        worker = self.workers[index]
        while worker.up and worker.running is None and worker.queue:
            attempt = worker.queue.popleft()
            if not self._needed(attempt):
                self._reorder(index)
                self._drop(attempt)
                continue
            worker.running, attempt.started = attempt, now
            self.sent += 1
            self._timer(now + self.rules.hang_timeout, "hang", attempt.identity)
            group = attempt.group
            alone = attempt.query is not None
            members = (attempt.query.identity,) if attempt.query else tuple(group.members)
            size = 1 if alone else group.size
            self._actions.append(
                Send(index, attempt.identity, self._number(attempt), members, size)
            )

    def _release(self, index: int, attempt: int) -> None:
        worker = self.workers[index]
        if worker.running is not None and worker.running.identity == attempt:
            worker.running = None
            self._reorder(index)

    def _number(self, attempt: Attempt) -> int:
        """Return the task's number in its group, which changes when a group is renumbered."""
        return attempt.query.member if attempt.query is not None else attempt.task

    def _result(self, now: float, attempt: Attempt) -> None:
        identity, query, group = attempt.identity, attempt.query, attempt.group
        if query is not None:
            query.attempts.discard(identity)
            self._observe(now - attempt.queued)
            if query.identity not in group.members:
                self._actions.append(Forget((identity,)))
                return
        first = group.arrived(self._number(attempt), identity)
        if first:
            self.computed_by[identity] = attempt.worker
            if group.is_complete and group.size > 1:
                workers = {t: self.computed_by[a] for t, a in group.outputs.items() if a != FILLER}
                self._actions.append(
                    Complete(group.identity, group.size, dict(group.outputs), workers)
                )
        if query is not None and query.state is not State.DONE:
            self._end(query, Answer(query.identity, identity))
        if not first:
            self._actions.append(Forget((identity,)))
        if group.identity in self.groups:
            self._settle(now, group)
            self._close_if_over(group)

    def _observe(self, latency: float) -> None:
        self.latencies.append(latency)
        self._fresh += 1
        if len(self.latencies) >= HEDGE_SAMPLES and (self._fresh >= 50 or self.hedge_after is None):
            self._fresh = 0
            ordered = sorted(self.latencies)
            self.hedge_after = ordered[int(HEDGE_QUANTILE * len(ordered))]

    def _lose(self, now: float, attempt: Attempt, reason: str) -> None:
        """An attempt will never answer."""
        self.attempts.pop(attempt.identity, None)
        query, group = attempt.query, attempt.group
        group.lost(self._number(attempt), attempt.identity)
        if query is not None:
            query.attempts.discard(attempt.identity)
            self._blame(query, reason)
        elif not self.systematic:
            hopeful = group.hopeful()  # what the code makes up for is nobody's loss
            for query in [self.queries[m] for m in group.members if m in self.queries]:
                if query.member not in hopeful:
                    self._blame(query, reason)
        elif self._needed(attempt) and group.retries < PARITY_RETRIES:
            group.retries += 1
            self._dispatch(now, Attempt(self._next(), group, None, attempt.task))
        self._settle(now, group)
        if query is not None and query.state is State.WAITING and not query.attempts:
            self._timer(now + PATIENCE, "resend", query.identity)
        self._close_if_over(group)

    def _blame(self, query: Query, reason: str) -> None:
        """Count a loss; a query that workers keep failing on is given up."""
        query.losses += 1
        if query.state is not State.WAITING or query.losses < self.rules.max_losses:
            return
        group = query.group
        hopeful = query.accept_decoded and not group.is_open and query.member in group.hopeful()
        if query.attempts or hopeful:
            return
        self._guess([query])
        if query.state is State.WAITING:
            self._give_up(query, f"lost {query.losses} times: {reason}")

    def _lose_worker(self, now: float, index: int, reason: str) -> None:
        worker = self.workers[index]
        if not worker.up:
            return
        worker.up = False
        running, worker.running = worker.running, None
        queued, worker.queue = list(worker.queue), deque()
        self._reorder(index)
        self._actions.append(Replace(index, reason))
        for attempt in queued:
            number = self._number(attempt)
            attempt.group.lost(number, attempt.identity)
            if self._needed(attempt):
                self._place(now, attempt)
            else:
                self._drop(attempt)
        if running is not None:
            self._lose(now, running, reason)

    def _hang_timeout(self, now: float, identity: int) -> None:
        attempt = self.attempts.get(identity)
        if attempt is None or attempt.started is None:
            return
        running = self.workers[attempt.worker].running
        if running is not None and running.identity == identity:
            self._lose_worker(now, attempt.worker, "hung")

    def _drop(self, attempt: Attempt) -> None:
        """Forget a task that nobody was given."""
        self.attempts.pop(attempt.identity, None)
        if attempt.query is not None:
            attempt.query.attempts.discard(attempt.identity)
        attempt.group.lost(self._number(attempt), attempt.identity)
        self._close_if_over(attempt.group)

    def _drop_queued(self, attempts: Iterable[int]) -> None:
        for identity in list(attempts):
            attempt = self.attempts.get(identity)
            if attempt is None or self._needed(attempt) or attempt.started is not None:
                continue
            if attempt.worker != NOBODY:
                self.workers[attempt.worker].queue.remove(attempt)
                self._reorder(attempt.worker)
            else:
                self.unplaced.remove(attempt)
            self._drop(attempt)

    def _timer(self, when: float, kind: str, identity: int) -> None:
        heapq.heappush(self._timers, (when, self._next(), kind, identity))

    def _is_moot(self, kind: str, identity: int) -> bool:
        """Tell whether a timer has nothing to do, whatever happens until it is due."""
        if kind == "group":
            group = self.groups.get(identity)
            return group is None or not group.is_open
        if kind == "hang":
            attempt = self.attempts.get(identity)
            return attempt is None or self.workers[attempt.worker].running is not attempt
        return identity not in self.queries

    def _flush(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions
