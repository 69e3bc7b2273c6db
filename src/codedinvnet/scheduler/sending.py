"""Tasks on their way: from being wanted until a worker is done with them, or nobody needs them.

The lowest part of the rules; `settling` says whom the outputs answer, `scheduler` what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from codedinvnet.codes.rules import CodeRules, Uncoded, is_systematic
from codedinvnet.exhaustive import assert_never
from codedinvnet.scheduler.actions import Action, Call, Decided, Forget, Send
from codedinvnet.scheduler.auto import Auto, Decision, workers_for
from codedinvnet.scheduler.binding import Binding
from codedinvnet.scheduler.group import FILLER, CodingGroup
from codedinvnet.scheduler.hedging import (
    RESCUES,
    RESCUES_EARLY,
    RESERVE,
    Budget,
    has_idle,
    wants_copy,
)
from codedinvnet.scheduler.pace import Pace
from codedinvnet.scheduler.settings import Policy, Rules
from codedinvnet.scheduler.tasks import NOBODY, Attempt, Query, State
from codedinvnet.scheduler.timers import Kind, Timers


def code_for(
    policy: Policy, workers: int, offered: CodeRules | None, backups: int = 0
) -> CodeRules:
    """Return the rules by which a policy makes groups.

    Args:
        policy: that is wanted.
        workers: how many there are.
        offered: the rules of the code that the workers know; None if they know none.
        backups: see `Rules`.

    Raises:
        ValueError: if the policy does not go with the code, or there are too few workers.
    """
    if policy.coded and offered is None:
        raise ValueError(f"policy {policy.name} needs a code")
    code: CodeRules = offered if policy.takes_code and offered is not None else Uncoded()
    needed = (policy.copies if backups else workers_for(policy, code)) + backups
    if workers < needed:
        raise ValueError(
            f"{workers} are too few: policy {policy.name} with k = {code.k} needs {needed}, since "
            "the tasks of a group go to distinct workers"
        )
    return code


class Sending:
    """The queries, groups and attempts that there are.

    Args:
        rules: see `Rules`.
        code: the rules of a code; unused by policies without one.

    Attributes:
        chosen: the policy that was asked for; `Scheduler.change_policy` takes another.
        policy: what is done about late answers now: that of `auto` changes by itself.
        code: the rules by which new groups are made.
        auto: what decides; None of other policies than `auto`.
        decision: what `auto` decided last; None before, and of other policies.

    Raises:
        ValueError: if the policy needs a code and there is none, there are too few workers, or
            `worker_batch` goes with several slots.
    """

    def __init__(self, rules: Rules, code: CodeRules | None = None) -> None:
        if rules.worker_batch > 1 and rules.slots > 1:
            raise ValueError("worker_batch goes with one slot")
        self.rules, self.offered = rules, code
        self.budget = Budget()
        self._go_by(rules.policy, code_for(rules.policy, rules.workers, code, rules.backups))
        self.systematic = is_systematic(self.code)
        self.pace = Pace(rules.workers, rules.slots)
        self.binding = Binding(rules, self.pace)
        self.hedges = 0
        """How many copies were sent of late queries."""
        self.queries: dict[int, Query] = {}
        self.attempts: dict[int, Attempt] = {}
        self.groups: dict[int, CodingGroup] = {}
        self.open_group: CodingGroup | None = None
        self.timers = Timers(self._is_dead)
        self.computed_by: dict[int, int] = {}
        """Attempt -> worker, of the outputs in use."""
        self.sent = 0
        """Tasks given to workers in all: the work that was done."""
        self._identity = 0
        self._actions: list[Action] = []

    def _go_by(self, policy: Policy, code: CodeRules) -> None:
        self.chosen, self.code = policy, code
        self.auto = Auto(None if isinstance(code, Uncoded) else code) if policy.adapts else None
        self.policy = policy if self.auto is None else self.auto.policy
        self.decision: Decision | None = None
        extra = self.rules.extra_of(policy)
        self.budget.share = self.rules.hedge_share if extra is None else extra
        self._bounded = extra is not None
        """Whether extra tasks are paid for, as copies are."""

    # Views

    @property
    def waiting(self) -> int:
        """How many tasks no worker is at."""
        return self.binding.waiting

    @property
    def workers_up(self) -> int:
        """How many workers are up."""
        return len(self.binding.up)

    def is_up(self, worker: int) -> bool:
        """Tell whether a worker is up."""
        return worker in self.binding.up

    def load(self, worker: int) -> int:
        """Return how many tasks a worker is at."""
        return len(self.binding.workers[worker].running)

    def is_at(self, worker: int, attempt: int) -> bool:
        """Tell whether a worker is at an attempt; if not, another may be in its place by now."""
        return attempt in self.binding.workers[worker].running

    def busy_since(self, worker: int) -> float | None:
        """Return when a worker began the oldest task that it is at; None if it is at none."""
        running = self.binding.workers[worker].running
        return next((attempt.started for attempt in running.values()), None)

    def wanted_until(self, attempt: int, latest: float) -> float:
        """Return the last deadline of those in an attempt's group who wait; 0 if nobody does.

        Args:
            attempt: its number.
            latest: the last deadline of who may yet join the group while it is open.
        """
        found = self.attempts.get(attempt)
        if found is not None and found.group.is_open:
            return latest
        members = () if found is None else found.group.members
        return max((self.queries[m].deadline for m in members if m in self.queries), default=0.0)

    # On the way

    def _look(self, now: float, count: int) -> None:
        """Take in what a request finds; let `auto` decide anew if it is time."""
        auto, binding = self.auto, self.binding
        binding.meets(count)
        if auto is not None and auto.is_due(count):
            seen = auto.seen(self.pace, binding.load, self.budget.recent)
            decision = auto.decide(now, seen)
            if self.decision is None or decision.policy != self.policy:
                self.policy, self.decision = decision.policy, decision
                self._actions.append(Decided(decision))

    def _next(self) -> int:
        self._identity += 1
        return self._identity

    def _needed(self, attempt: Attempt) -> bool:
        if attempt.query is not None and not attempt.shared:
            return attempt.query.state is not State.DONE
        group = attempt.group
        if attempt.query is None:
            return self._is_wanted(group, attempt.number)
        return any(member in self.queries for member in group.members)

    def _is_wanted(self, group: CodingGroup, task: int) -> bool:
        """Tell whether a member that a sealed group's task needs has no answer yet."""
        return any(member in self.queries for member in group.needs(task))

    def _dispatch(
        self,
        now: float,
        group: CodingGroup,
        task: int,
        query: Query | None = None,
        *,
        first: bool = False,
        extra: bool = False,
        paid: float = 0.0,
    ) -> None:
        """Let a task wait for a worker."""
        attempt = Attempt(self._next(), group, query, task, now, first, extra, paid=paid)
        self.attempts[attempt.identity] = attempt
        if query is not None:
            query.attempts[attempt.identity] = attempt
        group.sent(attempt.number, attempt.identity)
        self.binding.add(attempt)
        if self.rules.backups and self.policy.rescued and query is not None:
            late = self.pace.late(attempt.kind, NOBODY, attempt.bulk)
            if late is not None:
                self.timers.set(now + late, "waits", attempt.identity)

    def _send_data(
        self, now: float, query: Query, *, first: bool = False, paid: float = 0.0
    ) -> None:
        if self.systematic:
            self._dispatch(now, query.group, query.member, query, first=first, paid=paid)

    def _send_extra(
        self,
        now: float,
        group: CodingGroup,
        task: int,
        query: Query | None = None,
        *,
        first: bool = False,
        urgent: bool = False,
    ) -> bool:
        """Send a task that others may answer for if the budget allows; return whether it does.

        Args:
            now: the time.
            group: that it is of.
            task: its number.
            query: that is sent twice; None: the task is the code's.
            first: see `Attempt`.
            urgent: somebody is late, so that it leaves no reserve and does not yield.
        """
        work = 0.0
        if self._bounded and (query is not None or not self.rules.backups):
            copy = self.pace.price(group.bulk if query is None else query.bulk)
            work = self._cost(group, task) if query is None else copy
            if self.policy.rescued:  # all of whose times may be of one bad moment
                work = min(work, copy)
            if not self.budget.pay(work, 0.0 if urgent else RESERVE):
                return False
        self._dispatch(now, group, task, query, first=first, extra=not urgent, paid=work)
        return True

    def _cost(self, group: CodingGroup, task: int) -> float:
        """Return what an extra task of a code costs, in service times."""
        told = group.tasks[task].cost * self.pace.price(group.bulk)
        return self.pace.cost(group.size, group.bulk) or told

    def _begin_calls(self, now: float, attempts: Sequence[Attempt]) -> None:
        """Workers begin tasks, and compute in one call what they were given together."""
        calls: dict[int, list[Attempt]] = {}
        for attempt in attempts:
            calls.setdefault(attempt.worker, []).append(attempt)
        for own in calls.values():
            for attempt in own:
                attempt.together = len(own)
            sends = tuple(self._begin(now, attempt) for attempt in own)
            self._actions.append(sends[0] if len(sends) == 1 else Call(sends))
        self.binding.close_calls()

    def _begin(self, now: float, attempt: Attempt) -> Send:
        """Return what lets a worker begin a task."""
        self.sent += 1
        identity, query, group = attempt.identity, attempt.query, attempt.group
        self.timers.set(now + self.rules.hang_timeout_of(attempt.worker), "hang", identity)
        if query is None:
            if self.policy.rescued:
                self._watch(now, attempt)
            size = len(group.tasks[attempt.number].members)
            return Send(
                attempt.worker,
                identity,
                attempt.number,
                group.needs(attempt.number),
                size,
                group.size,
            )
        self._watch(now, attempt)
        if self.policy.rescued and self.pace.excess > RESCUES_EARLY and not self.rules.backups:
            self._watch_early(now, attempt)
        return Send(attempt.worker, identity, attempt.number, (query.identity,), 1)

    def _release(self, now: float, attempt: Attempt, is_usual: bool = True) -> None:
        """A worker has done a task's work."""
        if not self.binding.release(attempt) or attempt.started is None or not is_usual:
            return
        if self.rules.worker_batch > 1 and self.binding.workers[attempt.worker].running:
            return  # the last of a call tells how long it took
        worker, before = attempt.worker, self.pace.slowness(attempt.worker)
        seconds = now - attempt.started
        retry = self.pace.took(now, worker, attempt.kind, seconds, attempt.bulk)
        if self.pace.slowness(worker) != before:
            self.binding.reorder(worker)
        if retry is not None:
            self.timers.set(retry, "retry", worker)

    # Copies

    def _watch(self, since: float, attempt: Attempt) -> None:
        """Look at a task again when it is late, counted from when it began or was seen."""
        late = self.pace.late(attempt.kind, attempt.worker, attempt.bulk)
        if self.policy.hedged and late is not None:
            self.timers.set(since + late, "late", attempt.identity)

    def _watch_early(self, now: float, attempt: Attempt) -> None:
        """Look at a task when its rescue, sent then, would be here as soon as the task is late."""
        group = attempt.group
        late = self.pace.late(attempt.kind, attempt.worker, attempt.bulk)
        if late is not None and group.code.r and not group.is_open:
            rescue = self._cost(group, group.code.k) * self.pace.normal
            self.timers.set(now + max(0.0, late - rescue), "early", attempt.identity)

    @property
    def _backs_all(self) -> bool:
        """Whether groups get their extra tasks at once: none but a backup's worker may be up."""
        alone = self.rules.backups > 0 and not self.binding.slots_up
        return self.policy.coded or (self.policy.rescued and alone)

    def _late(self, now: float, identity: int, runs: bool = True) -> None:
        """An attempt has run, or only waited, for longer than its kind normally runs."""
        attempt = self.attempts.get(identity)
        if attempt is None or not self.policy.hedged:
            return
        again, attempt.late = attempt.late, attempt.late or runs
        if runs:
            self.binding.reorder(attempt.worker)
        if attempt.query is None:
            self._rescue_again(now, attempt)
        elif self.policy.rescued and (
            self._rescue(now, attempt) or (not again and self._is_rescued(attempt.group))
        ):
            if runs:
                self._watch(now, attempt)
        elif runs and wants_copy(attempt.query) and not self._copy(now, attempt.query):
            self._watch(now, attempt)

    def _rescue_again(self, now: float, attempt: Attempt) -> None:
        """What was sent to late queries is late as well: send it once more, and copies."""
        group, task = attempt.group, attempt.number
        waiting = [self.queries[member] for member in group.needs(task) if member in self.queries]
        if waiting and len(group.live[task]) < RESCUES:
            self._send_extra(now, group, task, first=True, urgent=True)
        for query in waiting:
            if wants_copy(query):
                self._copy(now, query)

    def _is_rescued(self, group: CodingGroup) -> bool:
        """Tell whether an extra task of a group is under way that is not late."""
        live = () if group.is_open else group.live.get(group.code.k, ())
        return any(not self.attempts[each].late for each in live)

    def _early(self, now: float, identity: int) -> None:
        """A task may soon be late: rescue its query while many workers are idle."""
        attempt, binding = self.attempts.get(identity), self.binding
        if attempt is None or not self.policy.rescued:
            return
        if has_idle(binding.running, binding.slots_up):
            self._rescue(now, attempt, urgent=False)

    def _rescue(self, now: float, attempt: Attempt, urgent: bool = True) -> bool:
        """Send a late query's group the extra task of its code, once; return whether it was."""
        query, group = attempt.query, attempt.group
        k = group.code.k
        if query is None or query.state is not State.WAITING or not query.accept_decoded:
            return False
        if group.is_open or not group.code.r or k in group.outputs:
            return False
        if group.live.get(k) or group.retries:
            return False
        return self._send_extra(now, group, k, first=True, urgent=urgent)

    def _copy(self, now: float, query: Query) -> bool:
        """Send a copy of a query if the budget allows; return whether it does."""
        work = self.pace.price(query.bulk)
        if not self.systematic or not self.budget.pay(work):
            return False
        query.copies += 1
        self.hedges += 1
        self._send_data(now, query, first=True, paid=work)
        return True

    def _copy_again(self, now: float, query: Query) -> None:
        """Copy a query that has none but late attempts left, or look at it again as long after.

        Its copy was lost, or what was decoded for it was withheld: no timer may be left that looks.
        """
        if not self.policy.hedged or not query.attempts or not wants_copy(query):
            return
        rescued = query.accept_decoded and self._is_rescued(query.group)
        if rescued or not self._copy(now, query):
            self._watch(now, next(iter(query.attempts.values())))

    # Not needed any more

    def _drop(self, attempt: Attempt) -> None:
        """Forget a task that nobody was given."""
        del self.attempts[attempt.identity]
        self.budget.refund(attempt.paid)
        if attempt.query is not None:
            attempt.query.attempts.pop(attempt.identity, None)
        attempt.group.lost(attempt.number, attempt.identity)
        self._close_if_over(attempt.group)

    def _drop_queued(self, attempts: Iterable[int]) -> None:
        for identity in list(attempts):
            attempt = self.attempts.get(identity)
            if attempt is None or attempt.started is not None or self._needed(attempt):
                continue
            self.binding.remove(attempt)
            self._drop(attempt)

    def _leave(self, query: Query) -> None:
        """Take a query that no worker was given out of its open group."""
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

    def _close_if_over(self, group: CodingGroup) -> None:
        if group.pending or not group.is_idle or group.identity not in self.groups:
            return
        if group.is_open and not group.is_full:
            return
        del self.groups[group.identity]
        self._forget(group, group.members)

    def _forget(self, group: CodingGroup, queries: Sequence[int]) -> None:
        used = tuple(a for a in group.outputs.values() if a != FILLER)
        for attempt in used:
            self.computed_by.pop(attempt, None)
        if used or queries:
            self._actions.append(Forget(used, tuple(queries)))

    # Timers

    def _is_dead(self, kind: Kind, identity: int) -> bool:
        """Tell whether a timer has nothing to do, whatever happens until it is due."""
        match kind:
            case "deadline" | "guess" | "resend":  # most are
                return identity not in self.queries
            case "group":
                group = self.groups.get(identity)
                return group is None or not group.is_open
            case "hang":
                attempt = self.attempts.get(identity)
                return attempt is None or not self.is_at(attempt.worker, identity)
            case "late" | "waits" | "early":
                return identity not in self.attempts
            case "retry":
                return identity not in self.pace.slow
            case "recheck":
                return False
            case _:
                assert_never(kind)
