"""A front end on imagined workers, which checks every action of the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

from codedinvnet.codes.rules import CodeRules
from codedinvnet.scheduler.actions import (
    DEADLINE,
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
)
from codedinvnet.scheduler.events import (
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
from codedinvnet.scheduler.group import FILLER, CodingGroup
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.queries import Attempt
from codedinvnet.scheduler.settings import Rules
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.watched import ErasureCode as ErasureCode
from tests.scheduler.watched import Watched

LONG = 1e6
"""A deadline that no test reaches unless it wants to."""

T = TypeVar("T")

FINAL = "for good"
"""Why a task is lost that is not to be sent again."""


class Model:
    """Carries actions out as `FrontEnd` does and knows what may be asked of it.

    Every assertion here is a rule that holds after any sequence of events.
    """

    def __init__(
        self, policy: str = "coded", workers: int = 4, code: CodeRules | None = None, **rules: Any
    ) -> None:
        rules = {"hang_timeout": 3.0, **rules}
        self.rules = Rules(workers=workers, policy=POLICIES[policy], **rules)
        self.scheduler = Watched(self.rules, code)
        self.now = 0.0
        self.at: dict[int, int] = {}
        """Attempt -> the worker that is at it, oldest first."""
        self.held: list[int] = []
        """Attempts whose worker is done with them and whose answer is on the way."""
        self.lost: list[int] = []
        """Attempts that the rules gave up; they may answer yet."""
        self.down: set[int] = set()
        self.sent: dict[int, Send] = {}
        self.query_of: dict[int, int | None] = {}
        """Attempt -> the query whose data task it is."""
        self.group_of: dict[int, CodingGroup] = {}
        self.groups: dict[int, CodingGroup] = {}
        self.outputs: set[int] = set()
        self.arrived: set[int] = set()
        self.forgotten: set[int] = set()
        self.images: set[int] = set()
        self.asked: dict[int, bool] = {}
        """Query -> whether a decoded answer will do."""
        self.deadlines: dict[int, float] = {}
        self.decoding: list[int] = []
        self.decoded_ones: set[int] = set()
        self.ended: dict[int, Answer | AnswerDecoded | Fail | None] = {}
        """None: it was cancelled."""
        self.spared: set[int] = set()
        """Attempts that there were when their query was cancelled."""
        self.earned = 0.0
        """What queries added to the budget."""
        self.unequal = False
        """Whether queries differ in bulk, so that a copy may cost more or less than one."""
        self.bounded = self.rules.extra_of(self.rules.policy) is not None
        self.final: set[int | None] = set()
        """Queries of which a task was lost for good."""
        self._new: list[Action] = []
        UNDER_WAY.append(self)

    # Events

    def handle(self, event: Event) -> None:
        assert is_plain(event), "bytes could not carry it"
        self.do(self.scheduler.handle(self.now, event))

    def submit(
        self, count: int = 1, timeout: float = LONG, accept: bool = True, bulk: int = 0
    ) -> list[int]:
        mean = max(1.0, self.scheduler.stats.mean)
        first = len(self.asked)
        numbers = tuple(range(first, first + count))
        for number in numbers:
            self.images.add(number)
            self.asked[number] = accept
            self.deadlines[number] = self.now + timeout
        extra = self.rules.extra_of(self.scheduler.chosen)
        self.earned += count * mean * (self.rules.hedge_share if extra is None else extra)
        self.handle(Submit(numbers, self.now + timeout, accept, bulk))
        return list(numbers)

    def release(self, attempt: int) -> None:
        worker = self.at.pop(attempt)
        self.held.append(attempt)
        self.handle(Released(worker, attempt))

    def result(self, *attempts: int) -> None:
        for attempt in attempts:
            self._free(attempt)
            self.outputs.add(attempt)
            known = attempt in self.scheduler.attempts
            if known:
                self.arrived.add(attempt)
                self.handle(Completed(attempt))
            else:
                assert self.scheduler.handle(self.now, Completed(attempt)) == [Forget((attempt,))]
                self.outputs.remove(attempt)

    def fail(self, *attempts: int, final: bool = False) -> None:
        for attempt in attempts:
            self._free(attempt)
            reason = FINAL if final else "raised"
            self.final |= {self.query_of[attempt]} if final else set()
            self.handle(Failed(attempt, reason, final))

    def kill(self, *workers: int) -> None:
        for worker in workers:
            self.handle(WorkerLost(worker, "killed"))
            assert worker in self.down

    def up(self, *workers: int) -> None:
        for worker in workers:
            self.down.remove(worker)
            self.handle(WorkerUp(worker))

    def decoded(self, query: int) -> None:
        self.decoding.remove(query)
        self.decoded_ones.add(query)
        ended = query in self.ended
        self.handle(Decoded(query))
        assert ended or isinstance(self.ended[query], AnswerDecoded)

    def withheld(self, query: int) -> None:
        self.decoding.remove(query)
        self.decoded_ones.add(query)
        self.asked[query] &= query in self.ended
        self.handle(Withheld(query))

    def cancel(self, *queries: int) -> None:
        for query in queries:
            if query not in self.ended:
                self.ended[query] = None
                self.spared |= set(self.scheduler.queries[query].attempts)
        actions = self.scheduler.handle(self.now, Gone(queries))
        assert {type(action) for action in actions} <= {Forget}
        self.do(actions)

    def change(self, policy: str) -> bool:
        """Change the policy; return whether the rules do."""
        before = (
            self.scheduler.chosen,
            self.scheduler.dispatcher.code,
            self.scheduler.flying.open_group,
        )
        try:
            actions = self.scheduler.handle(self.now, PolicyChanged(policy))
        except ValueError:
            now = (
                self.scheduler.chosen,
                self.scheduler.dispatcher.code,
                self.scheduler.flying.open_group,
            )
            assert now == before, "it was refused, and changed"
            return False
        assert self.scheduler.chosen.name == policy
        self.bounded = False  # tasks may have been sent before
        assert self.scheduler.flying.open_group is None, "no query would join it"
        self.do(actions)
        return True

    def replace_scheduler(self) -> dict[int, float]:
        """Have a new scheduler, which knows nothing; return when each attempt was begun."""
        self.forgotten |= self.outputs
        self.outputs.clear()
        old = self.scheduler
        running = [a for worker in old.assigner.workers for a in worker.running.values()]
        self.scheduler = Watched(self.rules)
        self.scheduler.flying.count = old.flying.count + 1000
        return {attempt.identity: attempt.started or 0.0 for attempt in running}

    def resume(self, began: dict[int, float]) -> None:
        """Tell a new scheduler what is in flight."""
        self.scheduler.dispatcher.sent = len(self.sent)
        for worker in self.down:
            self.scheduler.handle(self.now, WorkerLost(worker, "it was down before"))
        waits = [query for query in self.asked if not self.data(query)]
        for query in sorted(self.asked, key=lambda query: query in waits):
            accept = self.asked[query]
            at = tuple((a, self.at[a], began[a]) for a in self.data(query))
            submit = Submit((query,), self.deadlines[query], accept)
            if query in self.ended and at:
                self.scheduler.handle(self.now, Resumed(submit, at))
                self.scheduler.handle(self.now, Gone((query,)))
            elif query not in self.ended:
                self._new += self.scheduler.handle(self.now, Resumed(submit, at) if at else submit)
        for attempt, other in self.scheduler.attempts.items():
            self.group_of[attempt] = self.groups[other.group.identity] = other.group
        actions, self._new = self._new, []
        self.do(actions)

    def wait(self, seconds: float) -> None:
        """Let time pass; every timer fires when it is due."""
        until = self.now + seconds
        while (at := self.scheduler.next_timer()) is not None and at <= until:
            self.now = max(self.now, at)
            self.handle(TimerDue())
        self.now = until

    def oversleep(self, seconds: float) -> None:
        """Let time pass; the timers fire late, all at once."""
        self.now += seconds
        self.handle(TimerDue())

    def late(self, attempt: int) -> None:
        """Let an attempt be late now."""
        self.scheduler.timers.set(self.now, "late", attempt)
        self.oversleep(0)

    def drain(self) -> None:
        """Start the dead workers, deliver everything; then nothing may be left."""
        if self in UNDER_WAY:
            UNDER_WAY.remove(self)
        patience = self.now + 1000
        while True:
            for worker in sorted(self.down):
                self.up(worker)
            if self.at or self.held:
                self.result([*self.at, *self.held][0])
            elif self.decoding:
                self.decoded(self.decoding[0])
            elif (at := self.scheduler.next_timer()) is not None and at <= patience:
                self.wait(at - self.now)
            else:
                break
        hopeless = {q for q, accept in self.asked.items() if not accept and not self.systematic}
        assert set(self.asked) - set(self.ended) <= hopeless, "a query waits for nothing"
        self.wait(2 * LONG)
        scheduler = self.scheduler
        assert set(self.ended) == set(self.asked)
        assert not scheduler.queries
        assert not scheduler.flying.groups
        assert not scheduler.attempts
        assert not scheduler.flying.computed_by
        assert not scheduler.waiting
        assert scheduler.flying.open_group is None
        assert scheduler.next_timer() is None
        assert not any(map(scheduler.load, range(self.rules.workers)))
        assert not self.outputs
        assert not self.images
        assert self.forgotten == self.arrived

    # Views

    @property
    def systematic(self) -> bool:
        return self.scheduler.systematic

    @property
    def running(self) -> dict[int, int]:
        """Worker -> the attempt that it is at."""
        return {worker: attempt for attempt, worker in self.at.items()}

    @property
    def loads(self) -> list[int]:
        """How many tasks each worker has."""
        return [self.scheduler.load(worker) for worker in range(self.rules.workers)]

    def new(self) -> list[Action]:
        """Return the actions since the last call."""
        actions, self._new = self._new, []
        return actions

    def data(self, query: int) -> list[int]:
        """Return the attempts of a query's data task that workers are at, oldest first."""
        return sorted(attempt for attempt in self.at if self.query_of[attempt] == query)

    def parities(self) -> list[int]:
        """Return the attempts of parity tasks that workers are at, oldest first."""
        others = [attempt for attempt in self.at if self.query_of[attempt] is None]
        return sorted(a for a in others if self.sent[a].task >= self.group_of[a].code.k)

    def worker(self, attempt: int) -> int:
        return self.sent[attempt].worker

    # Actions

    def do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            assert is_plain(action), "bytes could not carry it"
            self._new.append(action)
            getattr(self, f"_{type(action).__name__.lower()}")(action)
        self.check()

    def _free(self, attempt: int) -> None:
        if self.at.pop(attempt, None) is None:
            (self.held if attempt in self.held else self.lost).remove(attempt)

    def _unanswered(self, query: int) -> None:
        assert query in self.asked
        assert query not in self.ended, "a query ended twice"

    def _send(self, action: Send) -> None:
        concurrency = self.scheduler.assigner.concurrency
        late = {each.identity for each in self.scheduler.attempts.values() if each.late}
        its = {attempt for attempt, worker in self.at.items() if worker == action.worker}
        busy = len(its - late if concurrency.is_found else its)
        assert busy < concurrency.slots(action.worker), "the worker has something else to do"
        self._begin(action)

    def _call(self, action: Call) -> None:
        (worker,) = {send.worker for send in action.sends}
        assert 1 < len(action.sends) <= self.rules.worker_batch
        assert worker not in self.at.values(), "it may not join a call that has begun"
        assert not any(send.group_size for send in action.sends), "an extra task is alone"
        assert len({send.members for send in action.sends}) == len(action.sends)
        for send in action.sends:
            self._begin(send)

    def _begin(self, action: Send) -> None:
        assert action.worker not in self.down
        assert action.attempt not in self.sent
        assert set(action.members) <= self.images
        attempt = self.scheduler.attempts[action.attempt]
        needing = action.members
        if not action.group_size and self.ended.get(needing[0], action) is None:
            assert not self.data(needing[0]), "it is computed already"
            assert action.attempt in self.spared, "a copy of what was cancelled"
            assert not attempt.group.is_open
            assert attempt.group.members.index(needing[0]) not in attempt.group.outputs
            needing = tuple(attempt.group.members)
        assert any(query not in self.ended for query in needing), "nobody needs it"
        assert action.worker in attempt.group.at
        if attempt.query is not None:
            assert (action.members, action.size) == ((attempt.query.identity,), 1)
        else:
            group = attempt.group
            needed = group.code.tasks(group.size)[action.task].members
            there = [group.members[i] for i in needed if i < len(group.members)]
            assert action.members == tuple(there)
            assert (action.size, action.group_size) == (len(needed), group.size)
            assert not self.systematic or action.task >= group.code.k
        if self.bounded and attempt.query is None and self.systematic:
            assert attempt.paid > 0, "it is not paid for"
        elif self.bounded and attempt.query is not None and not attempt.fallback:
            own = attempt.query.attempts
            begun = [attempt.paid, *(own[a].paid for a in own if a in self.at or a in self.held)]
            assert begun.count(0.0) <= 1, "it is not paid for"
            assert self.unequal or set(begun) <= {0.0, 1.0}, "they are as much work"
        self.at[action.attempt] = action.worker
        self.sent[action.attempt] = action
        self.query_of[action.attempt] = None if attempt.query is None else attempt.query.identity
        self.group_of[action.attempt] = attempt.group
        self.groups[attempt.group.identity] = attempt.group

    def _outputs_of(
        self, group: CodingGroup, size: int, outputs: Iterable[tuple[int, int]]
    ) -> None:
        """Check that outputs are at hand and are what they are said to be."""
        assert size == group.size
        fixed = group.code.fixed_size
        assert size == (group.code.k if fixed else len(group.members))
        for task, attempt in outputs:
            if attempt == FILLER:
                assert self.systematic
                assert fixed
                assert len(group.members) <= task < size
                continue
            assert attempt in self.outputs
            assert self.group_of[attempt] is group
            sent = self.sent[attempt]
            if self.systematic and task < size:
                assert sent.members == (group.members[task],)
            else:
                assert (sent.task, sent.members) == (task, group.needs(task))

    def _answer(self, action: Answer) -> None:
        self._unanswered(action.query)
        assert self.systematic
        assert action.attempt in self.outputs
        sent = self.sent[action.attempt]
        assert (sent.members, sent.size) == ((action.query,), 1)
        assert action.worker == sent.worker
        self.ended[action.query] = action

    def _decode(self, action: Decode) -> None:
        group = self.groups[action.group]
        self._outputs_of(group, action.size, action.outputs)
        code = group.code
        found = code.recoverable(frozenset(task for task, _ in action.outputs), action.size)
        assert action.wanted
        for query, member in action.wanted:
            self._unanswered(query)
            assert self.asked[query], "it does not take decoded answers"
            if member not in found:
                assert code.guesses
                assert max(task for task, _ in action.outputs) >= code.k, "nothing to guess from"
                assert action.guess
                known = self.scheduler.queries.get(query)  # it may be over by now
                lost = known is not None and known.losses >= self.rules.max_losses
                over = self.now >= self.deadlines[query] or query in self.final
                assert lost or over, "a better one may come"
            assert group.members[member] == query
            assert query not in self.decoding
            assert query not in self.decoded_ones, "it was decoded before"
            self.decoding.append(query)

    def _answerdecoded(self, action: AnswerDecoded) -> None:
        self._unanswered(action.query)
        assert action.query in self.decoded_ones
        assert self.asked[action.query]
        self.ended[action.query] = action

    def _fail(self, action: Fail) -> None:
        self._unanswered(action.query)
        if action.reason == DEADLINE:
            decoding = action.query in self.decoding
            assert self.now >= self.deadlines[action.query] + decoding * TUNING.grace
        elif action.reason != FINAL:
            assert action.reason.startswith("lost ")
            assert int(action.reason.split()[1]) >= self.rules.max_losses
        if self.asked[action.query] and action.query not in self.decoding:
            for group in self.groups.values():
                assert action.query not in group.members or not group.guessable(), "no guess at it"
        self.ended[action.query] = action

    def _replace(self, action: Replace) -> None:
        assert action.worker not in self.down
        self.down.add(action.worker)
        for attempt in [a for a, worker in self.at.items() if worker == action.worker]:
            del self.at[attempt]
            self.lost.append(attempt)

    def _compare(self, action: Compare) -> None:
        group = self.groups[action.group]
        self._outputs_of(group, action.size, action.outputs)
        assert {task for task, _ in action.outputs} == set(group.code.tasks(action.size))
        computed = tuple((task, self.worker(a)) for task, a in action.outputs if a != FILLER)
        assert action.workers == computed

    def _decided(self, action: Decided) -> None:
        assert self.scheduler.chosen.adapts
        assert action.policy == self.scheduler.policy.name

    def _copyrefused(self, action: CopyRefused) -> None:
        assert action.query in self.asked

    def _forget(self, action: Forget) -> None:
        assert action.attempts or action.queries
        for attempt in action.attempts:
            assert attempt in self.arrived
            assert attempt not in self.forgotten, "forgotten twice"
            self.outputs.remove(attempt)
            self.forgotten.add(attempt)
        for query in action.queries:
            assert query in self.ended
            self.images.remove(query)

    # Invariants

    def check(self) -> None:
        scheduler, workers = self.scheduler, self.scheduler.assigner.workers
        assert set(scheduler.queries) == set(self.asked) - set(self.ended)
        at = {a: i for i, worker in enumerate(workers) for a in worker.running}
        assert at == self.at
        assert scheduler.assigner.up == set(range(self.rules.workers)) - self.down
        waiting = [a for a in scheduler.attempts.values() if a.started is None]
        assert scheduler.waiting == len(waiting)
        assert all(map(scheduler.flying.is_needed, waiting)), "nobody needs it"
        assert {a.worker for a in waiting} <= {None}, "it was bound before it could begin"
        self.check_idle(waiting)
        assert scheduler.dispatcher.sent == len(self.sent)
        budget = scheduler.budget
        assert budget.tokens <= TUNING.bucket
        assert budget.tokens + budget.spent <= self.earned + 1e-6, "more than the budget"
        assert self.outputs >= set(scheduler.flying.computed_by)
        for group in scheduler.flying.groups.values():
            own = [a for a in scheduler.attempts.values() if a.group is group]
            assert group.at == Counter(a.worker for a in own if a.identity in at)
            assert group.members, "nobody is in it"
        for query in scheduler.queries.values():
            group = query.group
            if not query.is_waiting:
                assert query.identity in self.decoding
                continue
            assert scheduler.next_timer() is not None
            assert group.identity in scheduler.flying.groups
            hopeful = not group.is_open and query.member in group.hopeful()
            if query.takes_decoded and not group.is_open:
                assert query.member not in group.determined(), "it can be decoded"
                asked = query.attempts or query.fallback is not None
                assert asked or hopeful, "nothing is under way for it"
            elif self.systematic:
                assert query.attempts or query.fallback is not None, "nothing is under way for it"

    def check_idle(self, waiting: list[Attempt]) -> None:
        """No worker is idle while a task waits that it may take, unless it is too slow for it."""
        scheduler = self.scheduler
        for index, worker in enumerate(scheduler.assigner.workers):
            fallback = index >= self.rules.mains
            concurrency, load = scheduler.assigner.concurrency, len(worker.running)
            slots = self.rules.fallback_slots if fallback else scheduler.assigner.slots(index)
            if index not in self.down and not fallback and slots < concurrency.slots(index):
                assert scheduler.next_timer() is not None, "it would be held back for ever"
            drains = load > 0 and concurrency.drains(index)
            kept = not fallback and scheduler.assigner.is_kept_back(index)
            if index in self.down or load >= slots or drains or kept:
                continue
            for attempt in waiting:
                if attempt.fallback:
                    assert not fallback, "idle, yet a task for it waits"
                elif scheduler.assigner.may_take(index, attempt):
                    assert scheduler.is_passed_by(self.now, index, attempt), "idle, yet tasks wait"
                    at = scheduler.next_timer()
                    assert at is not None, "nobody will look at it again"


def is_plain(value: object) -> bool:
    """Tell whether a value is made of numbers, texts and tuples alone."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def only(actions: Iterable[Action], kind: type[T]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


UNDER_WAY: list[Model] = []
"""Models that are to be drained when their test has passed."""
