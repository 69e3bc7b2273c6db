"""The scheduler: who is answered when, what is sent again, and what is forgotten.

A deterministic state machine without I/O or clock. Events come in with the time `now` in seconds,
what is to be done comes out as actions, and `next_timer` says when `TimerDue` is wanted. The driver
feeds the events and has the actions carried out, on real workers or on imagined ones.

`Scheduler` only takes events. `grouping` puts queries into groups, `policies` says what is launched
when, `dispatch` pays for it and sends it, `assigner` chooses the worker, `stats` knows what is
late and who is slow, and `completion` ends queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from codedinvnet.codes.rules import CodeRules, Uncoded, is_systematic
from codedinvnet.scheduler.actions import Action, Forget, Snapshot
from codedinvnet.scheduler.caches import Prompt
from codedinvnet.scheduler.completion import Completion
from codedinvnet.scheduler.dispatch import Dispatcher
from codedinvnet.scheduler.events import (
    Cancelled,
    Completed,
    Decoded,
    Event,
    Failed,
    Gone,
    PolicyChanged,
    Released,
    Resumed,
    Submit,
    TimerDue,
    Withheld,
    WorkerLost,
    WorkerUp,
)
from codedinvnet.scheduler.group import Traffic
from codedinvnet.scheduler.grouping import Grouping
from codedinvnet.scheduler.policies import POLICIES, Policy
from codedinvnet.scheduler.queries import Attempt, Query, State
from codedinvnet.scheduler.settings import Rules


def code_for(policy: Policy, workers: int, offered: CodeRules | None) -> CodeRules:
    """Return the rules by which a policy makes groups.

    Args:
        policy: the policy.
        workers: how many there are, without fallbacks.
        offered: the rules of the code that the workers know; None if they know none.

    Raises:
        ValueError: if the policy does not go with the code, or there are too few workers.
    """
    if policy.coded and offered is None:
        raise ValueError(f"policy {policy.name} needs a code")
    code: CodeRules = offered if policy.takes_code and offered is not None else Uncoded()
    needed = policy.fewest_workers(code)
    if workers < needed:
        raise ValueError(
            f"{workers} are too few: policy {policy.name} with k = {code.k} needs {needed}, since "
            "the tasks of a group go to distinct workers"
        )
    return code


class Scheduler:
    """Takes events and returns actions.

    Args:
        rules: see `Rules`.
        code: the rules of a code; unused by policies without one.

    Attributes:
        chosen: the policy that the service goes by.

    Raises:
        ValueError: if the policy needs a code and there is none, there are too few workers, or
            `worker_batch` goes with several slots.
    """

    def __init__(self, rules: Rules, code: CodeRules | None = None) -> None:
        if rules.worker_batch > 1 and rules.slots != 1:
            raise ValueError("worker_batch goes with one slot")
        self.rules, self.offered, self.chosen = rules, code, rules.policy
        own = code_for(rules.policy, rules.mains, code)
        self.dispatcher = on = Dispatcher(rules, own)
        self.completion = Completion(on)
        self.grouping = Grouping(on, self.completion)
        self.flying, self.stats, self.budget = on.flying, on.stats, on.budget
        self.assigner, self.timers, self.systematic = on.assigner, on.timers, on.systematic
        self.queries, self.attempts = on.flying.queries, on.flying.attempts

    # Events

    def handle(self, now: float, event: Event) -> list[Action]:
        """Take an event, and return what to do about it.

        Raises:
            ValueError: if a policy does not go with the code or the workers; nothing is changed.
        """
        on, completion = self.dispatcher, self.completion
        on.now = now
        match event:
            case Submit():
                self._submit(event)
            case Resumed(submit, attempts):
                self._resume(submit, attempts)
            case Completed(number, is_usual, keeps_slot):
                if (attempt := self.attempts.pop(number, None)) is None:
                    on.actions.append(Forget((number,)))
                else:
                    on.release(attempt, is_usual, keeps_slot)
                    self.assigner.answers(attempt, is_usual)
                    if not is_usual and attempt.worker is not None:
                        self.assigner.lose_turn(attempt.worker)
                    completion.arrived(attempt, is_usual)
            case Released(worker, number):
                if (attempt := self.assigner.workers[worker].running.get(number)) is not None:
                    on.release(attempt, number in self.attempts)
            case TimerDue():
                self._on_timer()
            case Failed(number, reason, final, unsent):
                if (attempt := self._begun(number)) is not None:
                    self._lose(attempt, reason, final, unsent)
            case Cancelled(number):
                if (attempt := self._begun(number)) is not None:
                    if attempt.late:  # how late it would have been, nobody knows
                        on.release(attempt, is_cut=True)
                    self._lose(attempt, "cancelled")
            case WorkerLost(worker, reason, unsent_ones):
                completion.worker_lost(worker, reason, unsent_ones)
            case WorkerUp(worker):
                on.timers.set(self.assigner.restore(worker, now), "ramp", worker)
            case Decoded(number):
                if (query := self._decoding(number)) is not None:
                    completion.decoded(query)
            case Withheld(number):
                if (query := self._decoding(number)) is not None:
                    completion.withheld(query)
            case Gone(numbers):
                for query in [self.queries[each] for each in numbers if each in self.queries]:
                    completion.cancel(query)
            case PolicyChanged(name):
                self._change_policy(POLICIES[name])
            case _:
                assert_never(event)
        return completion.flush()

    def _submit(self, event: Submit) -> None:
        """Put the queries of a request into groups."""
        on, grouping, count = self.dispatcher, self.grouping, len(event.queries)
        on.meet(count)
        traffic = Traffic(event.route, event.size_class)
        prompt = Prompt(event.keys, event.size) if event.keys else None
        k = on.code.k if on.policy.coded else 1
        for start in range(0, count, k):
            numbers = event.queries[start : start + k]
            own = grouping.new() if len(numbers) == k else None
            for number in numbers:
                group = own or grouping.joinable()
                member = group.join(number, traffic)
                query = Query(
                    number, event.accept_decoded, event.deadline, group, member, traffic,
                    event.repeatable, event.delay, prompt=prompt, priority=event.priority,
                )  # fmt: skip
                grouping.joined(query)
                if own is None and group.is_full:
                    grouping.seal(group)
            if own is not None:
                grouping.seal(own)

    def _resume(self, event: Submit, attempts: Sequence[tuple[int, int, float]]) -> None:
        """Take a query over with the attempts that are under way."""
        on, traffic = self.dispatcher, Traffic(event.route, event.size_class)
        (number,) = event.queries
        group = self.grouping.new()
        query = Query(
            number, event.accept_decoded, event.deadline, group, group.join(number, traffic),
            traffic, event.repeatable, event.delay, priority=event.priority,
        )  # fmt: skip
        self.queries[number] = query
        on.timers.set(query.deadline, "deadline", number)
        for identity, worker, since in attempts:
            attempt = Attempt(identity, group, query, query.member, since)
            on.resume(attempt, worker, since)
        self.grouping.seal(group)

    def _begun(self, number: int) -> Attempt | None:
        """Return a live attempt that a worker has begun."""
        attempt = self.attempts.get(number)
        return None if attempt is None or attempt.worker is None else attempt

    def _lose(
        self, attempt: Attempt, reason: str, final: bool = False, unsent: bool = False
    ) -> None:
        if attempt.worker is not None:
            attempt.group.failed.add(attempt.worker)
            self.assigner.uncache(attempt)
        self.assigner.release(self.dispatcher.now, attempt)
        self.completion.lost(attempt, reason, final, unsent)

    def _decoding(self, number: int) -> Query | None:
        """Return a query that waits for what is being decoded for it."""
        query = self.queries.get(number)
        if query is None or query.state not in (State.DECODING, State.GRACE):
            return None
        return query

    def _change_policy(self, policy: Policy) -> None:
        """Go by another policy from now on; no query is lost.

        The open group is coded as if its time had come, and groups end by the code that they began
        with. What is done about late queries is the new policy's for all.
        """
        code = code_for(policy, self.rules.mains, self.offered)
        if is_systematic(code) != self.systematic:
            raise ValueError(f"without direct answers the code goes with {self.chosen.name} only")
        on = self.dispatcher
        if on.flying.open_group is not None:
            self.grouping.timeout(on.flying.open_group)
        self.chosen = policy
        on.go_by(policy, code)
        for attempt in self.attempts.values():
            own = attempt.query is not None and not attempt.fallback
            if policy.hedged and own and attempt.started is not None:
                on.watch(attempt, attempt.started)

    def next_timer(self) -> float | None:
        """Return when `TimerDue` is wanted next."""
        return self.timers.next()

    def _on_timer(self) -> None:
        """Do what is due."""
        on, completion, now = self.dispatcher, self.completion, self.dispatcher.now
        while (timer := self.timers.due(now)) is not None:
            kind, identity = timer
            if on.is_dead(kind, identity):
                continue
            match kind:
                case "group":
                    self.grouping.timeout(self.flying.groups[identity])
                case "hang":
                    completion.worker_lost(self.attempts[identity].worker or 0, "hung")
                case "late" | "waits":
                    on.late(identity, runs=kind == "late")
                case "retry":
                    if self.stats.retry(now, identity):
                        self.assigner.reorder(identity)
                case "unknown":
                    on.watch(self.attempts[identity], self.attempts[identity].started)
                case "ramp":
                    self.assigner.end_ramp(identity, now)
                case "recheck":
                    on.recheck = None
                case "resend":
                    query = self.queries[identity]
                    if query.is_waiting and not query.attempts:
                        on.send_own(query, first=True)
                case "deadline":
                    completion.time_over(self.queries[identity])
                case _:
                    assert_never(kind)

    # Views

    @property
    def policy(self) -> Policy:
        """What is done about late answers now: that of `auto` changes by itself."""
        return self.dispatcher.policy

    def snapshot(self) -> Snapshot:
        """Return what pages, metrics and admission show."""
        waits = self.assigner.waiting
        return Snapshot(self.chosen.name, self.slots_up, waits, self.dispatcher.delays())

    @property
    def waiting(self) -> int:
        """How many tasks no worker has."""
        return self.assigner.waiting

    @property
    def slots_up(self) -> int:
        """How many tasks the workers that are up may be at together."""
        return self.assigner.slots_up

    @property
    def workers_up(self) -> int:
        """How many workers are up."""
        return len(self.assigner.up)

    def is_up(self, worker: int) -> bool:
        """Return whether a worker is up."""
        return worker in self.assigner.up

    def load(self, worker: int) -> int:
        """Return how many tasks a worker is at."""
        return len(self.assigner.workers[worker].running)

    def is_at(self, worker: int, attempt: int) -> bool:
        """Return whether a worker is at an attempt; if not, another may be in its place by now."""
        return attempt in self.assigner.workers[worker].running
