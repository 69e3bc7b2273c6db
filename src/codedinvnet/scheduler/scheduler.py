"""The scheduler: who is answered when, what is sent again, and what is forgotten.

A deterministic state machine without I/O or clock. Events come in as method calls with the time
`now` in seconds, what is to be done comes out as actions, and `next_timer` says when to call
`on_timer`. A service carries the actions out on real workers, the simulator on imagined ones.

`Scheduler` only takes events. `grouping` puts queries into groups, `policies` says what is launched
when, `dispatch` pays for it and sends it, `assigner` chooses the worker, `stats` knows what is
late and who is slow, and `completion` ends queries.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import assert_never

from codedinvnet.codes.rules import CodeRules, Uncoded, is_systematic
from codedinvnet.scheduler.actions import Action
from codedinvnet.scheduler.auto import workers_for
from codedinvnet.scheduler.completion import Completion
from codedinvnet.scheduler.dispatch import Dispatcher
from codedinvnet.scheduler.group import Traffic
from codedinvnet.scheduler.grouping import Grouping
from codedinvnet.scheduler.policies import Policy
from codedinvnet.scheduler.queries import Query, State
from codedinvnet.scheduler.settings import Rules


def code_for(
    policy: Policy, workers: int, offered: CodeRules | None, backups: int = 0
) -> CodeRules:
    """Return the rules by which a policy makes groups.

    Args:
        policy: the policy.
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


class Scheduler:
    """Takes events and returns actions.

    Args:
        rules: see `Rules`.
        code: the rules of a code; unused by policies without one.

    Attributes:
        chosen: the policy that the service goes by; `change_policy` changes it.

    Raises:
        ValueError: if the policy needs a code and there is none, there are too few workers, or
            `worker_batch` goes with several slots.
    """

    def __init__(self, rules: Rules, code: CodeRules | None = None) -> None:
        if rules.worker_batch > 1 and rules.slots != 1:
            raise ValueError("worker_batch goes with one slot")
        self.rules, self.offered, self.chosen = rules, code, rules.policy
        own = code_for(rules.policy, rules.workers, code, rules.backups)
        self.dispatcher = on = Dispatcher(rules, own)
        self.completion = Completion(on)
        self.grouping = Grouping(on, self.completion)
        self.flying, self.stats, self.budget = on.flying, on.stats, on.budget
        self.assigner, self.timers, self.systematic = on.assigner, on.timers, on.systematic
        self.queries, self.attempts = on.flying.queries, on.flying.attempts

    # Events

    def submit(
        self,
        now: float,
        count: int,
        deadline: float,
        accept_decoded: bool = True,
        size_class: int = 0,
        route: str = "",
        repeatable: bool = True,
    ) -> tuple[list[int], list[Action]] | None:
        """Take the queries of one request; None if there are too many already.

        Args:
            now: the time.
            count: how many.
            deadline: when they are answered by a guess or fail, absolute.
            accept_decoded: whether a decoded answer will do.
            size_class: how large each is, as a class; times are learned for each class.
            route: what it asks; times are learned for each route.
            repeatable: whether a query may be computed twice. If not, it is not copied, and a lost
                attempt ends it unless it was never sent.

        Returns:
            The queries' numbers and what to do.
        """
        if len(self.queries) + count > self.rules.max_pending:
            return None
        on, grouping = self.dispatcher, self.grouping
        on.now = now
        on.meet(count)
        traffic = Traffic(route, size_class)
        k = on.code.k if on.policy.coded else 1
        numbers: list[int] = []
        for start in range(0, count, k):
            size = min(k, count - start)
            own = grouping.new() if size == k else None
            for _ in range(size):
                group = own or grouping.joinable()
                number = on.flying.number()
                numbers.append(number)
                member = group.join(number, traffic)
                query = Query(number, accept_decoded, deadline, group, member, traffic, repeatable)
                grouping.joined(query)
                if own is None and group.is_full:
                    grouping.seal(group)
            if own is not None:
                grouping.seal(own)
        return numbers, self.completion.flush()

    def released(self, now: float, worker: int, attempt: int, is_cut: bool = False) -> list[Action]:
        """A worker has done an attempt's work; its answer may still be on the way, or here.

        Args:
            now: the time.
            worker: that has it.
            attempt: its number.
            is_cut: whether it was late and is cancelled before its end.
        """
        self.dispatcher.now = now
        found = self.assigner.workers[worker].running.get(attempt)
        if found is not None:
            self.dispatcher.release(found, attempt in self.attempts, is_cut=is_cut)
        return self.completion.flush()

    def result(
        self, now: float, attempt: int, is_usual: bool = True, keeps_slot: bool = False
    ) -> list[Action]:
        """An attempt's output is here.

        Args:
            now: the time.
            attempt: its number.
            is_usual: whether its time tells how long such tasks take.
            keeps_slot: its worker goes on with it, such as a stream, until `released`.
        """
        self.dispatcher.now = now
        found = self.attempts.pop(attempt, None)
        if found is not None:
            self.dispatcher.release(found, is_usual, keeps_slot)
            self.completion.arrived(found, is_usual)
        return self.completion.flush()

    def failed(
        self, now: float, attempt: int, reason: str, final: bool = False, unsent: bool = False
    ) -> list[Action]:
        """An attempt raised on its worker, or its answer was lost on the way.

        Args:
            now: the time.
            attempt: its number.
            reason: why.
            final: whether its query ends, unless something under way may answer it.
            unsent: whether the worker saw nothing of it.
        """
        self.dispatcher.now = now
        found = self.attempts.get(attempt)
        if found is not None and found.worker is not None:
            found.group.failed.add(found.worker)
            self.assigner.release(now, found)
            self.completion.lost(found, reason, final, unsent)
        return self.completion.flush()

    def worker_lost(
        self, now: float, worker: int, reason: str, unsent: Container[int] = ()
    ) -> list[Action]:
        """A worker is dead: its tasks are lost, and it is to be replaced.

        It never got the tasks `unsent`: their queries may be sent again whatever they are.
        """
        self.dispatcher.now = now
        self.completion.worker_lost(worker, reason, unsent)
        return self.completion.flush()

    def worker_up(self, now: float, worker: int) -> list[Action]:
        """A worker is ready again."""
        self.dispatcher.now = now
        self.assigner.restore(worker)
        return self.completion.flush()

    def decoded(self, now: float, query: int) -> list[Action]:
        """The logits that a `Decode` asked for are here."""
        self.dispatcher.now = now
        found = self.queries.get(query)
        if found is not None and found.state in (State.DECODING, State.GRACE):
            self.completion.decoded(found)
        return self.completion.flush()

    def withheld(self, now: float, query: int) -> list[Action]:
        """What was decoded for a query is none, or may not be released: it waits for its own.

        It waits for the task that it has, with a copy if the policy sends some, or gets another
        first in line.
        """
        self.dispatcher.now = now
        found = self.queries.get(query)
        if found is not None and found.state in (State.DECODING, State.GRACE):
            self.completion.withheld(found)
        return self.completion.flush()

    def cancel(self, queries: Iterable[int]) -> list[Action]:
        """The clients of these queries are gone; queries that are over are ignored."""
        for identity in queries:
            if (query := self.queries.get(identity)) is not None:
                self.completion.cancel(query)
        actions, self.dispatcher.actions = self.dispatcher.actions, []
        return actions

    def change_policy(self, now: float, policy: Policy) -> list[Action]:
        """Go by another policy from now on; no query is lost.

        The open group is coded as if its time had come, and groups end by the code that they began
        with. What is done about late queries is the new policy's for all.

        Raises:
            ValueError: if the policy does not go with the code or the workers; nothing is changed.
        """
        code = code_for(policy, self.rules.workers, self.offered, self.rules.backups)
        if is_systematic(code) != self.systematic:
            raise ValueError(f"without direct answers the code goes with {self.chosen.name} only")
        on = self.dispatcher
        on.now = now
        if on.flying.open_group is not None:
            self.grouping.timeout(on.flying.open_group)
        self.chosen = policy
        on.go_by(policy, code)
        for attempt in self.attempts.values():
            if policy.hedged and attempt.query is not None and attempt.started is not None:
                on.watch(attempt, attempt.started)
        return self.completion.flush()

    def next_timer(self) -> float | None:
        """Return when `on_timer` wants to be called next."""
        return self.timers.next()

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        on, completion = self.dispatcher, self.completion
        on.now = now
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
        return completion.flush()

    # Views

    @property
    def policy(self) -> Policy:
        """What is done about late answers now: that of `auto` changes by itself."""
        return self.dispatcher.policy

    @property
    def waiting(self) -> int:
        """How many tasks no worker has."""
        return self.assigner.waiting

    @property
    def workers_up(self) -> int:
        """How many workers are up."""
        return len(self.assigner.up)

    def is_up(self, worker: int) -> bool:
        """Tell whether a worker is up."""
        return worker in self.assigner.up

    def load(self, worker: int) -> int:
        """Return how many tasks a worker is at."""
        return len(self.assigner.workers[worker].running)

    def is_at(self, worker: int, attempt: int) -> bool:
        """Tell whether a worker is at an attempt; if not, another may be in its place by now."""
        return attempt in self.assigner.workers[worker].running
