"""How tasks get to workers: from being wanted until a worker is done with them or they are dropped.

A *needed* task is the only one that can answer somebody; a task that is *extra* yields: it is
dropped when its turn comes if many needed tasks wait behind it. How many depends on what
stragglers cost (`LatencyStats.overhead`) and on the share of the slots that is idle
(`TaskAssigner.load`): `yields_after` times both for every slot, and `yields_at` at most. Where none
straggles, extra tasks are computed only while none waits.

What a policy launches is paid from the budget here, and nowhere else. A copy costs one service
time, or its share of it if queries differ in size. Another extra task costs what such tasks take,
or what its code says before that is known; a backup for a late query costs no more than a copy:
when all workers stall, only slow ones are measured, and none would ever be paid again. Without
`Rules.extra` only copies of late queries are paid for, and what fallbacks are asked never is: it
takes nothing from the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import assert_never

from codedinvnet.codes.rules import CodeRules, Uncoded, is_systematic
from codedinvnet.scheduler.actions import Action, Call, CopyRefused, Decided, Forget, Send
from codedinvnet.scheduler.assigner import TaskAssigner
from codedinvnet.scheduler.budget import Budget
from codedinvnet.scheduler.group import FILLER, CodingGroup, Traffic, size_class
from codedinvnet.scheduler.policies import Launch, Policy, Then
from codedinvnet.scheduler.policies.auto import Decider
from codedinvnet.scheduler.queries import Attempt, InFlight, Query
from codedinvnet.scheduler.races import Races
from codedinvnet.scheduler.settings import Rules, copied_after
from codedinvnet.scheduler.stats import LatencyStats
from codedinvnet.scheduler.timers import Kind, Timers


class Dispatcher:
    """Sends tasks to workers.

    Args:
        rules: see `Rules`.
        code: the rules by which the policy makes groups.

    Attributes:
        now: the time of the event that is being handled.
        actions: what is to be done about it.
        policy: what is done about late answers now; that of `auto` changes by itself.
        decider: what decides for `auto`; None of other policies.
        decision: what it decided last.
        hedges: how many copies of late queries were launched.
        sent: how many tasks workers got.
    """

    def __init__(self, rules: Rules, code: CodeRules) -> None:
        self.rules, self.tuning = rules, rules.tuning
        self.now = 0.0
        self.actions: list[Action] = []
        self.flying = InFlight()
        self.timers = Timers(self.is_dead)
        self.stats = LatencyStats(rules.workers, rules.slots, rules.tuning)
        self.assigner = TaskAssigner(rules, self.stats)
        self.budget = Budget(rules.head_start * rules.hedge_share, rules.tuning)
        self.races = Races(rules.tuning)
        self.systematic = is_systematic(code)
        self.sent = self.hedges = 0
        self._random = random.Random(0)
        self.recheck: float | None = None
        """When tasks that a slow worker passed by are offered again."""
        self.decider: Decider | None = None
        self.go_by(rules.policy, code)

    def go_by(self, policy: Policy, code: CodeRules) -> None:
        """Begin to go by a policy."""
        self.code = code
        self.decider, self.policy = None, policy
        if policy.adapts:
            offered = None if isinstance(code, Uncoded) else code
            self.decider = Decider(offered, self.tuning, self.rules.fallbacks > 0)
            self.policy = self.decider.policy
        self.decision: Decided | None = None
        extra = self.rules.extra_of(policy)
        self.budget.share = self.rules.hedge_share if extra is None else extra
        self._pays_all = extra is not None

    def meet(self, queries: int) -> None:
        """Measure the load that a request of so many queries finds; decide again if it is time."""
        self.assigner.meets(queries)
        decider = self.decider
        if decider is None or not decider.is_due(queries):
            return
        seen = decider.seen(self.stats, self.assigner.load, self.budget.recent)
        decided = decider.decide(self.now, seen)
        if self.decision is None or decider.policy != self.policy:
            self.policy, self.decision = decider.policy, decided
            self.actions.append(decided)

    @property
    def slots_up(self) -> int:
        """How many tasks the workers that are up may be at together."""
        return self.assigner.slots_up

    # To the line

    def launch(self, launch: Launch) -> bool:
        """Send what a policy wants to be sent if the budget allows; return whether it does."""
        group, task, query, first, urgent, hedge = launch
        work = self._price(launch)
        if query is not None and (query.held_out or not (self.systematic and query.repeatable)):
            return False
        if hedge and query is not None and not self._pays(query):
            return False
        if work is not None and not self.budget.pay(work, 0.0 if urgent else self.tuning.reserve):
            if hedge and query is not None:
                self.actions.append(CopyRefused(query.identity))
            return False
        attempt = self.send(group, task, query, first=first, extra=not urgent, hedge=hedge)
        attempt.paid = work or 0.0
        if hedge and query is not None:
            query.copies += 1
            attempt.level = query.level or 0
            self.hedges += 1
        return True

    def _pays(self, query: Query) -> bool:
        """Return whether a copy of a late query is worth what it costs."""
        before, query.level = query.level, self._level(query)
        is_new = query.level != before
        return self.races.allows(query.traffic, query.level, self.assigner.load, is_new)

    def _level(self, query: Query) -> int:
        """Return how late a query is: 1 from 4 times the time on, 2 from 32 times on."""
        began = [each.started for each in query.attempts.values() if each.started is not None]
        oldest = next(iter(query.attempts.values()), None)
        late = self.stats.late(0, None, query.traffic if oldest is None else oldest.traffic)
        if not began or not late:
            return 0
        times, later = (self.now - min(began)) / late, self.tuning.later
        return (times >= later) + (times >= 8 * later)

    def _price(self, launch: Launch) -> float | None:
        """Return what a launch costs, in service times; None if it is free."""
        group, query = launch.group, launch.query
        if not launch.hedge and not self._pays_all:
            return None
        if query is not None:
            return self.stats.price(self._cheapest(query))
        cost = self.cost(group, launch.task)
        return min(cost, self.stats.price(group.traffic)) if self.policy.backs_late else cost

    def _cheapest(self, query: Query) -> Traffic:
        """Return what a copy of a query would have to compute at least."""
        if query.prompt is None:
            return query.traffic
        new = self.assigner.cheapest(query)
        return Traffic(query.traffic.route, size_class(new), is_prompt=True)

    def cost(self, group: CodingGroup, task: int) -> float:
        """Return what an extra task of a code costs, in service times."""
        said = group.tasks[task].cost * self.stats.price(group.traffic)
        return self.stats.cost(group.size, group.traffic) or said

    def send(
        self,
        group: CodingGroup,
        task: int,
        query: Query | None = None,
        *,
        first: bool = False,
        extra: bool = False,
        hedge: bool = False,
    ) -> Attempt:
        """Let a task wait for a worker."""
        number = self.flying.number()
        attempt = Attempt(number, group, query, task, self.now, first, extra, hedge)
        self.flying.attempts[number] = attempt
        if query is not None:
            query.attempts[number] = attempt
        group.sent(attempt.number, number)
        self.assigner.add(attempt)
        if query is not None:
            self.policy.queued(self, attempt)
        return attempt

    def resume(self, attempt: Attempt, worker: int, since: float) -> None:
        """Take over an attempt at a query's own task that a worker has been at for a while."""
        identity, query, group = attempt.identity, attempt.query, attempt.group
        assert query is not None
        self.flying.attempts[identity] = attempt
        attempt.fallback = worker >= self.rules.mains
        if attempt.fallback:
            query.fallback, query.fell_back = identity, True
        else:
            query.attempts[identity] = attempt
            group.sent(attempt.number, identity)
        self.assigner.begin(worker, attempt, since)
        self.timers.set(since + self.rules.hang_timeout, "hang", identity)
        if self.policy.hedged and not attempt.fallback:
            self.watch(attempt, since)

    def fall_back(self, query: Query | None) -> bool:
        """Ask a cheaper worker about a query, once; return whether it is asked now."""
        if query is None or not query.is_waiting or not query.repeatable or query.fell_back:
            return False
        number = self.flying.number()
        own = Attempt(number, query.group, query, query.member, self.now, fallback=True)
        self.flying.attempts[number] = own
        query.fallback, query.fell_back = number, True
        self.assigner.add(own)
        return True

    def send_own(self, query: Query, first: bool = False) -> None:
        """Let a query's own task wait for a worker, if its code has one."""
        if self.systematic:
            self.send(query.group, query.member, query, first=first)

    # To the workers

    def assign(self) -> Iterator[CodingGroup]:
        """Let workers begin what waits for them; yield the group of each task that is dropped."""
        assigner, batch = self.assigner, self.rules.worker_batch
        if not assigner.waiting:
            return
        calls: dict[int, list[Attempt]] = {}
        while (taken := assigner.take(self.now)) is not None:
            worker, attempt = taken
            if self._yields(attempt) or self._holds_out(attempt):
                assigner.release(self.now, attempt)
                self.drop(attempt)
                yield attempt.group
            elif batch > 1:
                calls.setdefault(worker, []).append(attempt)
            else:
                self.actions.append(self._begin(worker, attempt))
        if batch > 1:
            self._begin_calls(calls)
        at = assigner.recheck
        if at is not None and (self.recheck is None or at < self.recheck):
            self.recheck = at
            self.timers.set(at, "recheck", 0)

    def _yields(self, attempt: Attempt) -> bool:
        """Return whether a task would lengthen a line of needed ones too much."""
        assigner = self.assigner
        if not attempt.extra:
            return False
        worth = self.tuning.yields_after * self.stats.overhead * (1.0 - assigner.load)
        return assigner.needed > min(self.tuning.yields_at, worth) * assigner.slots_up

    def _holds_out(self, attempt: Attempt) -> bool:
        """Return whether this copy, the first of its query, is held out, and so are all others.

        It is decided by lot, and only when a worker would begin the copy: whatever was answered
        before would have been answered without copies as well.
        """
        query, share = attempt.query, self.rules.hold_out
        if not share or not attempt.hedge or query is None or query.copies > 1:
            return False
        query.held_out = self._random.random() < share
        if query.held_out:
            self.assigner.uncache(attempt)
            self.actions.append(CopyRefused(query.identity, held_out=True))
        return query.held_out

    def _begin_calls(self, calls: Mapping[int, Sequence[Attempt]]) -> None:
        """Let each worker compute all of its tasks in one call."""
        for worker, own in calls.items():
            for attempt in own:
                attempt.together = len(own)
            sends = tuple(self._begin(worker, attempt) for attempt in own)
            self.actions.append(sends[0] if len(sends) == 1 else Call(sends))
        self.assigner.close_calls()

    def _begin(self, worker: int, attempt: Attempt) -> Send:
        """Return what lets a worker begin a task."""
        self.sent += 1
        identity, query, group = attempt.identity, attempt.query, attempt.group
        self.timers.set(self.now + self.rules.hang_timeout, "hang", identity)
        if not attempt.fallback:
            self.policy.begun(self, attempt)
        if query is not None:
            own = (query.identity,)
            return Send(worker, identity, attempt.number, own, 1, copy=attempt.hedge)
        size = len(group.tasks[attempt.number].members)
        members = group.needs(attempt.number)
        return Send(worker, identity, attempt.number, members, size, group.size)

    def watch(self, attempt: Attempt, since: float | None = None) -> None:
        """Look at a task again when it is late, counted from now, or from `since`."""
        if attempt.query is None:
            late = self.stats.late(attempt.kind, attempt.worker, attempt.traffic)
        elif attempt.query.repeatable:
            late = self.stats.late(attempt.kind, attempt.worker, attempt.traffic)
            if attempt.new is not None:
                copy = self.stats.expected(attempt.new.route, self.assigner.cheapest(attempt.query))
                if late is None:  # it may be known after half as long again
                    ran = self.now - (self.now if since is None else since)
                    self.timers.set(self.now + max(copy, ran / 2), "unknown", attempt.identity)
                else:
                    late = max(copy, min(late, self.tuning.patience) if attempt.late else late)
            late = copied_after(late, attempt.query.delay)
            first = self.rules.first_delay
            if late is None and first is not None:  # not late: what takes so long may be usual
                self.timers.set(self.now + first, "waits", attempt.identity)
        else:
            return
        if late is not None:
            self.timers.set((self.now if since is None else since) + late, "late", attempt.identity)

    def delays(self) -> tuple[tuple[str, float], ...]:
        """Return how long a query of each route runs until it is late, see `Snapshot`."""
        usual = self.stats.usual_traffics()
        known = ((each.route, self.stats.late(0, None, each)) for each in usual)
        return tuple((route, late) for route, late in known if late is not None)

    def late(self, identity: int, runs: bool = True) -> None:
        """Let the policy see an attempt that has run, or only waited, for long."""
        attempt = self.flying.attempts.get(identity)
        if attempt is None or not self.policy.hedged:
            return
        again = attempt.late
        if runs:
            self.assigner.late(attempt)
        if self.policy.late(self, attempt, again, runs) is Then.WATCH and runs:
            self.watch(attempt)

    def release(
        self,
        attempt: Attempt,
        is_usual: bool = True,
        keeps_slot: bool = False,
        is_cut: bool = False,
    ) -> None:
        """Free the slot of a task whose work is done, and learn from its time.

        With `keeps_slot` its worker has answered, and goes on with it.
        """
        worker, began, assigner = attempt.worker, attempt.started, self.assigner
        ran = assigner.is_running(attempt) if keeps_slot else assigner.release(self.now, attempt)
        if not ran or worker is None or began is None or not is_usual or attempt.fallback:
            return
        if self.rules.worker_batch > 1 and assigner.workers[worker].running:
            return  # the last of a call shows how long it took
        if attempt.paid and attempt.query is not None:
            waited = attempt.place > assigner.concurrency.computed(worker) and attempt.ahead
            self._account(attempt, self.now - (waited or began))
        if attempt.behind:
            return  # its time is that of the late one
        before = self.stats.slowness(worker)
        seconds = self.now - began
        if assigner.ramps(worker) and not is_cut:
            ratio = self.stats.ratio(seconds, attempt.kind, attempt.traffic)
            assigner.did(worker, in_time=ratio < self.tuning.slow)
        retry = self.stats.took(self.now, worker, attempt.kind, seconds, attempt.traffic, is_cut)
        ahead, found = attempt.ahead or self.now, assigner.concurrency
        overtook = attempt.place > 1 and not attempt.ahead and assigner.workers[worker].has_late
        changed = not (is_cut or overtook) and found.took(
            worker, attempt.place, seconds, ahead - began, attempt.traffic
        )
        if changed:
            assigner.reorder_all()
        elif self.stats.slowness(worker) != before:
            assigner.reorder(worker)
        if retry is not None:
            self.timers.set(retry, "retry", worker)

    def _account(self, attempt: Attempt, seconds: float) -> None:
        """Record what a copy really took, in service times."""
        work = self.stats.ratio(seconds, attempt.kind, attempt.traffic)
        attempt.work = work = work * self.stats.price(attempt.traffic)
        query = attempt.query
        if attempt.hedge and query is not None and (query.is_pending or query.answered is not None):
            self.races.ended(attempt.traffic, attempt.level, work)

    def note_race(self, attempt: Attempt, lost: bool = False) -> None:
        """Record what a copy saved, once both it and its original have ended.

        An original that is lost or cancelled would have run as long again.
        """
        query, since = attempt.query, attempt.started if lost else None
        if query is None or attempt.hedge or query.answered is None or query.won_at is None:
            return
        saved = self.now - (query.answered if since is None else since)
        if self.stats.normal > 0:
            self.races.won(query.traffic, query.won_at, saved / self.stats.normal)

    def note_answer(self, attempt: Attempt) -> None:
        """Record how long a data task's answer took, and charge a copy what it took.

        A loser that is cancelled gives no answer: it keeps its price.
        """
        if attempt.work is not None:
            self.budget.correct(attempt.paid, min(attempt.work, self.tuning.most_charged))
        if attempt.started is not None and attempt.worker is not None:
            seconds = self.now - attempt.started
            self.stats.answered(attempt.worker, seconds, attempt.kind, attempt.traffic)

    # Not needed any more

    def drop(self, attempt: Attempt) -> None:
        """Forget a task that no worker has begun."""
        del self.flying.attempts[attempt.identity]
        self.budget.refund(attempt.paid)
        if attempt.fallback and attempt.query is not None:
            attempt.query.fallback = None
        elif attempt.query is not None:
            attempt.query.attempts.pop(attempt.identity, None)
        attempt.group.lost(attempt.number, attempt.identity)
        self.close_if_over(attempt.group)

    def drop_queued(self, attempts: Iterable[int]) -> None:
        """Forget those of these tasks that no worker has begun and no query needs."""
        for identity in list(attempts):
            attempt = self.flying.attempts.get(identity)
            if attempt is None or attempt.started is not None or self.flying.is_needed(attempt):
                continue
            self.assigner.remove(attempt)
            self.drop(attempt)

    def close_if_over(self, group: CodingGroup) -> None:
        """Forget a group that waits for nothing."""
        if group.pending or not group.is_idle or group.identity not in self.flying.groups:
            return
        if group.is_open and not group.is_full:
            return
        del self.flying.groups[group.identity]
        self.forget(group, group.members)

    def forget(self, group: CodingGroup, queries: Sequence[int]) -> None:
        """Let a group's outputs, and the images of queries, be forgotten."""
        used = tuple(a for a in group.outputs.values() if a != FILLER)
        for attempt in used:
            self.flying.computed_by.pop(attempt, None)
        if used or queries:
            self.actions.append(Forget(used, tuple(queries)))

    def is_dead(self, kind: Kind, identity: int) -> bool:
        """Return whether a timer has nothing to do, whatever happens until it is due."""
        flying = self.flying
        match kind:
            case "deadline" | "resend":  # most are
                return identity not in flying.queries
            case "group":
                group = flying.groups.get(identity)
                return group is None or not group.is_open
            case "hang":
                attempt = flying.attempts.get(identity)
                return attempt is None or not self.assigner.is_running(attempt)
            case "late" | "waits" | "unknown":
                return identity not in flying.attempts
            case "retry":
                return identity not in self.stats.slow
            case "ramp":
                return not self.assigner.ramps(identity)
            case "recheck":
                return False
            case _:
                assert_never(kind)
