"""All orders of events of a small service, walked through.

Three workers, two groups of two queries, one crash, one hang whose
answer may come after all, and one cancellation. In every state each event that can happen does, and
`Model` checks its rules after each; states that differ by numbers alone are walked through once.
From every state in which nothing is left to happen, everything is delivered: each query has then
ended once, and nothing is left behind.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from tests.serving.rules.model import ErasureCode, Model

WORKERS, K = 3, 2
SOON = 1.0
"""Seconds within which a timer is an event of its own: a group's, and of what was lost."""
MINUTES = 10.0
"""The walk ends with an error if it takes longer."""


Path: TypeAlias = tuple[tuple[str, int], ...]
"""The events that led to a state."""


@dataclass(frozen=True)
class Left:
    """What is still to happen."""

    submits: tuple[int, ...] = (2, 2)
    """Queries of each request."""
    crashes: int = 1
    hangs: int = 1
    cancellations: int = 1


def events(model: Model, left: Left) -> Iterator[tuple[str, int, Left]]:
    """Yield what can happen, with what is left then."""
    if left.submits:
        yield "submit", left.submits[0], replace(left, submits=left.submits[1:])
    for attempt in [*model.at, *model.held]:
        yield "result", attempt, left
    for query in model.decoding:
        yield "decoded", query, left
    up = [worker for worker in range(WORKERS) if worker not in model.down]
    if left.crashes:
        for worker in up:
            yield "kill", worker, replace(left, crashes=0)
    if left.hangs:
        for worker in up:
            if model.running.get(worker) is not None:
                yield "hang", worker, replace(left, hangs=0)
    for worker in model.down:
        yield "up", worker, left
    for attempt in model.lost:
        yield "late", attempt, left
    if left.cancellations:
        for query in model.asked:
            if query not in model.ended:
                yield "cancel", query, replace(left, cancellations=0)
    at = model.scheduler.next_timer()
    if at is not None and at - model.now < SOON:
        yield "timer", 0, left


def happen(model: Model, event: str, n: int) -> None:
    """Let an event happen."""
    if event == "submit":
        model.submit(n)
    elif event in ("result", "late"):
        model.result(n)
    elif event == "decoded":
        model.decoded(n)
    elif event in ("kill", "hang"):
        lost = [a for a, worker in model.at.items() if worker == n]
        model.kill(n)
        if event == "kill":  # what a dead worker was at never answers
            model.lost = [attempt for attempt in model.lost if attempt not in lost]
    elif event == "up":
        model.up(n)
    elif event == "cancel":
        model.cancel(n)
    else:
        at = model.scheduler.next_timer()
        assert at is not None
        model.wait(max(0.0, at - model.now))
    model.new()


def fingerprint(model: Model, left: Left) -> Hashable:
    """Return what tells a state from others: identities count by their order alone."""
    scheduler, binding = model.scheduler, model.scheduler.binding
    known = {*scheduler.queries, *scheduler.attempts, *scheduler.groups, *model.lost}
    known |= {*model.held, *model.at, *model.decoding, *model.outputs, *model.images}
    known |= {m for group in scheduler.groups.values() for m in group.members}
    names = {identity: place for place, identity in enumerate(sorted(known))}

    def named(identities: Any) -> tuple[int, ...]:
        return tuple(sorted(names.get(identity, -1) for identity in identities))

    turns = sorted(range(WORKERS), key=lambda worker: binding.workers[worker].turn)
    places = {worker: place for place, worker in enumerate(turns)}  # they differ in nothing else

    def placed(workers: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(places.get(worker, -1) for worker in workers))

    queries = tuple(
        (names[q.identity], q.state, q.member, q.losses, q.copies, q.fallback, named(q.attempts))
        for q in scheduler.queries.values()
    )
    attempts = tuple(
        (
            (names[a.identity], names.get(a.group.identity, -1), a.number),
            (places.get(a.worker, -1), a.started is None, a.query is None),
            (a.first, a.extra, a.late, a.shared),
        )
        for a in scheduler.attempts.values()
    )
    groups = tuple(
        (
            (names[g.identity], g.size, g.retries, tuple(names.get(m, -1) for m in g.members)),
            tuple(sorted((task, names.get(a, -1)) for task, a in g.outputs.items())),
            tuple(sorted((task, named(own)) for task, own in g.live.items() if own)),
            (placed(g.at), placed(g.failed)),
        )
        for g in scheduler.groups.values()
    )
    timers = tuple(
        sorted(
            (round(when - model.now, 6), kind, names.get(identity, -1))
            for when, _, kind, identity in scheduler.timers._heap
            if when - model.now < SOON and not scheduler._is_dead(kind, identity)
        )
    )
    opened = scheduler.open_group
    tokens = round(scheduler.budget.tokens, 6)
    at = tuple(sorted((names[a], places[worker]) for a, worker in model.at.items()))
    own = (named(model.lost), named(model.held), named(model.decoding), placed(model.down))
    first = None if opened is None else names[opened.identity]
    return queries, attempts, groups, timers, own, at, tokens, first, left


def walk(policy: str, seconds: float = 60 * MINUTES) -> tuple[int, int]:
    """Walk through all orders; return how many states there are, and in how many all is over.

    Raises:
        AssertionError: if a rule is broken; its message ends with the events that led there.
        TimeoutError: if it takes longer.
    """
    began = time.monotonic()
    first = Model(policy, WORKERS, ErasureCode(K), max_pending=20)
    stack: list[tuple[bytes, Left, tuple[tuple[str, int], ...]]] = [
        (pickle.dumps(first), Left(), ())
    ]
    seen: set[Hashable] = set()
    ends = 0
    while stack:
        state, left, path = stack.pop()
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{len(seen)} states in {seconds:g} s, and {len(stack)} are left")
        possible = list(events(pickle.loads(state), left))
        if not possible:
            ends += 1
            _checked(pickle.loads(state).drain, path)
        for event, n, rest in possible:
            model = pickle.loads(state)
            _checked(partial(happen, model, event, n), (*path, (event, n)))
            mark = hash(fingerprint(model, rest))
            if mark not in seen:
                seen.add(mark)
                stack.append((pickle.dumps(model), rest, (*path, (event, n))))
    return len(seen), ends


def _checked(call: Callable[[], object], path: Path) -> None:
    try:
        call()
    except AssertionError as error:
        raise AssertionError(f"{error}\nafter {list(path)}") from error
