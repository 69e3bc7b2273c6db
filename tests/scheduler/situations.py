"""Situations of the scheduler from which its tests begin."""

from __future__ import annotations

from typing import Any

from codedinvnet.scheduler.queries import Attempt
from codedinvnet.scheduler.races import Races
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.model import ErasureCode, Model


def coded(k: int = 3, r: int = 1, *, spare: int = 0, policy: str = "coded", **rules: Any) -> Model:
    """Return a model with one worker for each task of a group, and some more."""
    return Model(policy, k + r + spare, ErasureCode(k, r), **rules)


def hedging(policy: str = "hedge", **options: Any) -> Model:
    """Return a model that knows latencies of 1 to 20 ms and has saved up copies."""
    model = Model(policy, **{"workers": 2, "hedge_share": 0.5, **options})
    for i in range(TUNING.times_needed):
        (query,) = model.submit()
        assert model.data(query)
        model.wait((i + 1) / 1000)
        while model.running:
            model.result(next(iter(model.running.values())))
    model.wait(1)  # the open group is over
    model.scheduler.dispatcher.races = Races()
    model.earned += TUNING.bucket
    model.scheduler.budget.tokens = min(
        TUNING.bucket, TUNING.times_needed * model.rules.hedge_share
    )
    model.new()
    return model


def know_times(model: Model, slow: float = 1.0) -> None:
    """Let a model know that data tasks take 10 to 15 ms, and on worker 0 `slow` times as long."""
    scheduler = model.scheduler
    for i in range(TUNING.times_needed):
        for worker in range(model.rules.workers):
            scheduler.stats.took(0.0, worker, 0, 0.015 if i % 2 else 0.010)
    for i in range(3 * (slow > 1)):
        scheduler.stats.took(0.015 * slow * (i + 1), 0, 0, 0.015 * slow)
    scheduler.assigner.reorder(0)


def busy(k: int, policy: str = "coded", **rules: Any) -> Model:
    """Return a coding model whose k + 1 workers are at cancelled queries."""
    model = coded(k, policy=policy, hang_timeout=100.0, **rules)
    model.submit(k)
    model.cancel(*model.asked)
    assert len(model.running) == k + 1
    model.new()
    return model


def own(model: Model, query: int) -> list[Attempt]:
    """Return the attempts of a query's data task, queued or not."""
    return [model.scheduler.attempts[a] for a in sorted(model.scheduler.queries[query].attempts)]


def parity(model: Model, query: int) -> Attempt:
    """Return the attempt of the parity task of a query's group, queued or not."""
    group = model.scheduler.queries[query].group
    (attempt,) = [a for a in model.scheduler.attempts.values() if a.group is group and not a.query]
    return attempt


def finish(model: Model, *attempts: Attempt) -> None:
    """Let workers finish these attempts, and what is before them, the oldest first."""
    for attempt in attempts:
        while attempt.started is None:
            model.result(next(a for a, i in model.at.items() if attempt.worker in (None, i)))
        model.result(attempt.identity)
