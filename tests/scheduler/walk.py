"""All orders of events of a small service, walked through.

Three workers, requests that make two groups of two, a crash, a hang and a cancellation, or what
else is asked for. In every state each event that can happen does, and `Model` checks its rules
after each. No time passes: a timer that is set may go off before or after any other event. A worker
hangs when the timer of its task goes off; its answer may come after all, and changes nothing then.

A state is what decides the future: which tasks wait, in which order, who is at which, and what is
here of whom. Numbers do not count, nor which group is which; workers are told apart by whose turn
it is. A state that was met before is not walked through again.

Wherever nothing is left to happen, everything is delivered: each query has then ended once, and
nothing is left behind. No state follows from itself, so that every order ends.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from codedinvnet.scheduler.events import TimerDue
from codedinvnet.scheduler.queries import Attempt
from codedinvnet.scheduler.timers import Kind, Timers
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.model import ErasureCode, Model

WORKERS, K = 3, 2

Event: TypeAlias = tuple[str, int]


class AnyOrder(Timers):
    """Timers that go off in any order: the next one is the one that is chosen."""

    chosen: Event | None = None

    @property
    def live(self) -> list[Event]:
        """Those that have something to do."""
        return sorted(timer[2:] for timer in self._heap if not self._dead(*timer[2:]))

    def due(self, now: float) -> tuple[Kind, int] | None:
        if self.chosen is None:
            return super().due(now)
        chosen, self.chosen = self.chosen, None
        self._heap.remove(next(timer for timer in self._heap if timer[2:] == chosen))
        self._heap.sort()
        return cast("tuple[Kind, int]", chosen)


@dataclass(frozen=True)
class Left:
    """What is still to happen."""

    submits: tuple[int, ...] = (2, 2)
    """Queries of each request."""
    crashes: int = 1
    hangs: int = 1
    cancellations: int = 1
    losses: int = 0
    """Tasks that are lost for good."""
    withheld: int = 0
    """Decoded answers that are not released."""
    takeovers: int = 0
    """Schedulers that a new one takes over from."""


def timers_of(model: Model) -> AnyOrder:
    timers = model.scheduler.timers
    assert isinstance(timers, AnyOrder)
    return timers


def service(policy: str, worker_batch: int = 1) -> Model:
    """Return a service that knows what is late, because every task so far took a second."""
    code = ErasureCode(K)
    rules = {"hedge_share": 0.5, "worker_batch": worker_batch, "hang_timeout": 10.0}
    model = Model(policy, WORKERS, code, **rules)
    _prepare(model)
    return model


def _prepare(model: Model) -> None:
    scheduler = model.scheduler
    for _ in range(TUNING.times_needed):
        scheduler.stats.took(0.0, 0, 0, 1.0)
    scheduler.timers = scheduler.dispatcher.timers = AnyOrder(scheduler.dispatcher.is_dead)


def events(model: Model, left: Left) -> Iterator[tuple[Event, Left]]:
    """Yield what can happen, with what is left then."""
    if left.submits:
        yield ("submit", left.submits[0]), replace(left, submits=left.submits[1:])
    for attempt in model.at:
        yield ("result", attempt), left
    for query in model.decoding:
        yield ("decoded", query), left
    for worker in model.down:
        yield ("up", worker), left
    if left.losses:
        for attempt in model.at:
            yield ("loss", attempt), replace(left, losses=left.losses - 1)
    if left.withheld:
        for query in model.decoding:
            yield ("withheld", query), replace(left, withheld=left.withheld - 1)
    if left.crashes:
        for worker in range(WORKERS):
            if worker not in model.down:
                yield ("crash", worker), replace(left, crashes=left.crashes - 1)
    if left.cancellations:
        for query in model.scheduler.queries:
            yield ("cancel", query), replace(left, cancellations=left.cancellations - 1)
    for kind, identity in dict.fromkeys(timers_of(model).live):
        if kind != "hang":
            if kind != "deadline":
                yield (kind, identity), left
        elif left.hangs:
            yield (kind, identity), replace(left, hangs=left.hangs - 1)
    if left.takeovers:
        yield ("takeover", 0), replace(left, takeovers=left.takeovers - 1)
    if model.lost:
        yield ("late answer", model.lost[0]), left


def happen(model: Model, event: Event) -> None:
    """Let an event happen."""
    kind, n = event
    if kind == "submit":
        model.submit(n)
    elif kind in ("result", "late answer"):
        model.result(n)
    elif kind == "decoded":
        model.decoded(n)
    elif kind == "loss":
        model.fail(n, final=True)
    elif kind == "withheld":
        model.withheld(n)
    elif kind == "crash":
        lost = [attempt for attempt, worker in model.at.items() if worker == n]
        model.kill(n)
        model.lost = [attempt for attempt in model.lost if attempt not in lost]  # it never answers
    elif kind == "up":
        model.up(n)
    elif kind == "cancel":
        model.cancel(n)
    elif kind == "takeover":
        began = model.replace_scheduler()
        _prepare(model)
        model.resume(began)
    else:
        timers_of(model).chosen = event
        model.handle(TimerDue())
    model.new()


def fingerprint(model: Model, left: Left) -> str:
    """Return what tells a state from others.

    Left out is what cannot matter before a hundred queries have come: the load, what stragglers
    cost, and running times.
    """
    scheduler, binding = model.scheduler, model.scheduler.assigner
    turns = sorted(range(WORKERS), key=lambda worker: binding.workers[worker].turn)
    places = {worker: place for place, worker in enumerate(turns)}
    tasks: dict[int, list[Attempt]] = {identity: [] for identity in scheduler.flying.groups}
    for attempt in scheduler.attempts.values():
        tasks[attempt.group.identity].append(attempt)

    def marks(a: Attempt) -> tuple[int, ...]:
        own = a.query is not None
        place = -1 if a.worker is None else places[a.worker]
        flags = (a.first, a.extra, a.late, a.shared, a.together)
        return (a.number, own, place, a.started is None, *flags)

    groups = []
    for group in scheduler.flying.groups.values():
        members: list[object] = []
        for identity in group.members:
            q = scheduler.queries.get(identity)
            state = q and (q.state.value, q.losses, q.copies, q.takes_decoded)
            members.append(state)
        groups.append(
            (
                (group.size, group.retries, len(group.code.tasks(1)), *members),
                sorted(map(marks, tasks[group.identity])),
                sorted(group.outputs),
                sorted(group.live),
                group.identity,
            )
        )
    waiting = [a for a in scheduler.attempts.values() if a.started is None]
    waiting.sort(key=lambda a: (not a.first, a.identity))
    line = [a.group.identity for a in waiting]
    groups.sort(key=lambda g: (repr(g[:-1]), line.index(g[-1]) if g[-1] in line else -1))
    places_of = {group[-1]: place for place, group in enumerate(groups)}
    queries, attempts = dict[int, tuple[int, ...]](), dict[int, tuple[int, ...]]()
    for identity, place in places_of.items():
        for member, query in enumerate(scheduler.flying.groups[identity].members):
            queries[query] = (place, member)
        for a in tasks[identity]:
            attempts[a.identity] = (place, *marks(a))

    def named(kind: str, identity: int) -> object:
        if kind == "group":
            return places_of[identity]
        return queries[identity] if kind == "resend" else attempts[identity]

    live = timers_of(model).live
    return repr(
        (
            [group[:-1] for group in groups],
            [attempts[a.identity] for a in waiting],
            sorted((k, named(k, n)) for k, n in live if k not in ("deadline", "hang")),
            sorted(places[worker] for worker in model.down),
            round(scheduler.budget.tokens, 6),
            (len(model.outputs), len(model.images), len(model.decoding)),
            left,
        )
    )


@dataclass
class Walk:
    """What was met."""

    seen: dict[int, bool] = field(default_factory=dict)
    """The mark of a state -> whether all that follows it is walked through."""
    steps: int = 0
    """How many events happened."""
    ends: int = 0
    """How many states have nothing left to happen."""


def walk(model: Model, left: Left) -> Walk:
    """Walk through all orders.

    Raises:
        AssertionError: if a rule is broken, with the events that led there.
    """
    found = Walk()
    path: list[Event] = []
    stack = [_arrive(found, model, left)]
    try:
        while stack:
            mark, state, todo = stack[-1]
            if not todo:
                found.seen[mark] = True
                stack.pop()
                if path:
                    path.pop()
                continue
            event, rest = todo.pop()
            path.append(event)
            model = pickle.loads(state)
            happen(model, event)
            found.steps += 1
            after = hash(fingerprint(model, rest))
            assert after == mark or event[0] != "late answer", "it changed something"
            if after in found.seen:
                assert after == mark or found.seen[after], "the order never ends"
                path.pop()
            else:
                stack.append(_arrive(found, model, rest, after))
    except Exception as error:  # a rule that is broken may end in a KeyError
        raise AssertionError(f"{error!r}\nafter {path}") from error
    return found


def _arrive(
    found: Walk, model: Model, left: Left, mark: int | None = None
) -> tuple[int, bytes, list[tuple[Event, Left]]]:
    mark = hash(fingerprint(model, left)) if mark is None else mark
    found.seen[mark] = False
    state = pickle.dumps(model, pickle.HIGHEST_PROTOCOL)
    todo = list(events(model, left))
    if not todo:
        found.ends += 1
        model.drain()
    return mark, state, todo
