"""A scenario of what a running service has seen lately: its arrivals, times, stragglers and losses.

Bursts are told from single delays by chance: if a share p of the tasks is late, each by itself, p
of the late ones are followed by another on the same worker. If far more are, two late tasks or more
in a row are an *episode*, and episodes that overlap are one burst. All other times are fitted as
`codedinvnet fit` does.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import poisson

from codedinvnet.errors import UserError
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.fit import ORDINARY, Fitted, fit
from codedinvnet.simulation.scenario import Scenario, Straggler, parse_scenario
from codedinvnet.simulation.task_times import FEWEST_TASKS, WorkerTasks
from codedinvnet.simulation.traffic import Recorded, check_rules

FEWEST_REQUESTS = 200
"""Fewer tell nothing of a tail."""
CHANCE = 1e-3
"""Late tasks that follow late ones on a worker are taken for bursts if they are less likely."""
MIXED = 0.2
"""No bursts are told from single delays that would make so many pairs for each by chance."""
FEWEST_EXTRA = 5
"""So many extra tasks of a size must have been seen to say what they take."""


class Took(NamedTuple):
    """When a task began and what it took, in ms."""

    at: float
    ms: float


class Episode(NamedTuple):
    """A stretch in which a worker was slow. Times are in ms."""

    begin: float
    end: float
    worker: int
    factor: float


@dataclass(frozen=True)
class Condition:
    """What the workers are like.

    Attributes:
        fitted: times and delays, without episodes.
        stragglers: all of them.
        extra_cost: see `Scenario`.
    """

    fitted: Fitted
    stragglers: tuple[Straggler, ...]
    extra_cost: Mapping[int, float]


def scenario_of(seen: Recorded, queries: int, seed: int) -> Scenario:
    """Return the scenario that repeats what was seen, with the policy uncoded.

    Raises:
        UserError: if too little was seen.
    """
    if len(seen.requests) < FEWEST_REQUESTS:
        raise UserError(
            f"{len(seen.requests)} requests are too few to tell anything by: {FEWEST_REQUESTS} "
            "at least"
        )
    rules = seen.rules
    check_rules("advice", rules)
    found = condition(seen)
    requests = sorted(seen.requests, key=lambda row: row[0])
    gaps = np.diff([row[0] for row in requests], prepend=requests[0][0]).round(3).tolist()
    gaps[0] = statistics.fmean(gaps[1:])  # since nothing is known of the one before
    sizes = [row[1] for row in requests]
    front = [row[3] for row in requests if row[2] is not None and not row[4]]
    decode = [row[3] for row in requests if row[2] is not None and row[4]]
    usual = statistics.median(front) if front else 0.0
    restarts = [row[3] for row in seen.losses]
    workers = max(rules.workers, len(found.fitted.workers))
    qps = 1000 * sum(sizes) / max(1e-3, sum(gaps))
    raw: dict[str, Any] = {
        **rules.model_dump(exclude={"hedge_share", "backups", "upstream_hang_timeout_ms"}),
        "name": "recorded",
        "seed": seed,
        "queries": queries,
        "policy": "uncoded",
        "workers": workers,
        "k": rules.k if rules.k > 1 else max(1, round(1 / rules.hedge_share)),
        "max_batch": max(sizes),
        "arrivals": {
            "kind": "recorded",
            "qps": qps,
            "batch": max(1, round(statistics.fmean(sizes))),
            "gaps_ms": gaps,
            "sizes": sizes,
        },
        "service": found.fitted.service.model_dump(),
        "encode": (seen.encode_share or 0.0) * found.fitted.service.mean_ms,
        "extra_cost": found.extra_cost,
        "front_end": sampled(front),
        "decode": max(0.0, statistics.median(decode) - usual) if decode else 0.0,
        "stragglers": [straggler.model_dump() for straggler in found.stragglers],
    }
    if restarts:
        raw["restart"] = sampled(restarts)
    return parse_scenario(raw, "what the service has seen")


def sampled(values: Sequence[float]) -> dict[str, Any] | float:
    """Return times in ms as a distribution; 0 of none."""
    if not values:
        return 0.0
    return {"distribution": "empirical", "values_ms": sorted(values)}


def condition(seen: Recorded) -> Condition:
    """Find out what the workers are like.

    Raises:
        UserError: if too few tasks were seen.
    """
    data = sorted(row for row in seen.tasks if not row[2])
    if len(data) < FEWEST_TASKS:
        raise UserError(f"{len(data)} tasks are too few to tell anything by: {FEWEST_TASKS}")
    own: dict[int, list[Took]] = {}
    for at, worker, _, occupied, _ in data:
        own.setdefault(worker, []).append(Took(at, occupied))
    episodes, single = told_apart(own)
    for at, worker, _, occupied, _ in seen.earlier:
        single.setdefault(worker, []).append(Took(at, occupied))
    fitted = fit(
        [
            WorkerTasks(str(worker), np.array([took.ms for took in times]))
            for worker, times in sorted(single.items())
            if times
        ]
    )
    numbers = {int(name): number for number, name in enumerate(fitted.workers)}
    seconds = max(1e-3, (data[-1][0] - data[0][0]) / 1000)
    stragglers = [
        *fitted.stragglers,
        *bursts(episodes, seconds, len(numbers)),
        *held([row[4] for row in data]),
        *lost(seen, own, numbers),
    ]
    usual = fitted.service.mean_ms
    return Condition(fitted, tuple(stragglers), extra_costs(seen, usual))


def told_apart(
    own: Mapping[int, Sequence[Took]],
) -> tuple[list[Episode], dict[int, list[Took]]]:
    """Return the episodes, and what tasks took outside them, by worker and in order."""
    medians = {worker: statistics.median(took.ms for took in row) for worker, row in own.items()}
    usual = statistics.median_low(medians.values())
    normal = {worker: max(usual, median) for worker, median in medians.items()}
    runs = {worker: list(runs_of(row, normal[worker])) for worker, row in own.items()}
    count = sum(map(len, own.values()))
    lengths = [len(run) for row in runs.values() for late, run in row if late]
    share = lengths.count(1) / count
    pairs = sum(length - 1 for length in lengths)
    if poisson.sf(pairs - 1, max(count * share**2, 1 / count)) > CHANCE:
        return [], {worker: list(row) for worker, row in own.items()}
    episodes, rest = [], {}
    for worker, row in runs.items():
        long = [run for late, run in row if late and len(run) > 1]
        for run in long:
            factor = statistics.median(took.ms for took in run) / normal[worker]
            episodes.append(Episode(run[0].at, run[-1].at + run[-1].ms, worker, factor))
        rest[worker] = [took for late, run in row if not late or len(run) == 1 for took in run]
    if share and count * share**2 > len(episodes) * MIXED:
        return [], {worker: list(row) for worker, row in own.items()}
    return episodes, rest


def runs_of(row: Sequence[Took], normal: float) -> Iterator[tuple[bool, list[Took]]]:
    """Yield a worker's tasks in runs of late ones, and of others."""
    for late, run in itertools.groupby(row, lambda took: took.ms > ORDINARY * normal):
        yield late, list(run)


def bursts(episodes: Sequence[Episode], seconds: float, workers: int) -> list[Straggler]:
    """Return the straggler that makes such episodes, if there are any."""
    clusters: list[list[Episode]] = []
    for episode in sorted(episodes):
        if clusters and episode.begin < max(other.end for other in clusters[-1]):
            clusters[-1].append(episode)
        else:
            clusters.append([episode])
    if not clusters:
        return []
    lengths = [max(e.end for e in own) - min(e.begin for e in own) for own in clusters]
    size = statistics.fmean(len({e.worker for e in own}) for own in clusters)
    return [
        Straggler(
            kind="burst",
            factor=statistics.median(episode.factor for episode in episodes),
            workers=min(workers, max(1, round(size))),
            every_s=seconds / len(clusters),
            delay=Distribution.model_validate(sampled(lengths)),
        )
    ]


def held(times: Sequence[float]) -> list[Straggler]:
    """Return the straggler that holds answers back, from how long each was, if any was."""
    late = [value for value in times if value > 0]
    if not late:
        return []
    delay = Distribution.model_validate(sampled(late))
    return [Straggler(kind="hold", probability=len(late) / len(times), delay=delay)]


def lost(
    seen: Recorded, own: Mapping[int, Sequence[Took]], numbers: Mapping[int, int]
) -> list[Straggler]:
    """Return the stragglers that lose workers: those that hang, and those that die.

    What was lost before the first task that is remembered is of tasks that nobody can count.
    """
    found = []
    since = min(took.at for row in own.values() for took in row)
    for kind, reasons in (("hang", ("hung",)), ("crash", ("died", "failing", "wrong"))):
        victims = [row[1] for row in seen.losses if row[2] in reasons and row[0] >= since]
        if not victims:
            continue
        alone = len(victims) > 1 and len(set(victims)) == 1 and victims[0] in numbers
        tasks = len(own.get(victims[0], ())) if alone else sum(map(len, own.values()))
        share = len(victims) / (tasks + len(victims))
        worker = numbers[victims[0]] if alone else None
        found.append(
            Straggler.model_validate({"kind": kind, "probability": share, "worker": worker})
        )
    return found


def extra_costs(seen: Recorded, service_ms: float) -> dict[int, float]:
    """Return what extra tasks take by the size of their group, in services, where that was seen.

    Sizes that were seen too rarely lie on the line through the others.
    """
    times: dict[int, list[float]] = {}
    for _, _, members, occupied, _ in seen.tasks:
        if members:
            times.setdefault(members, []).append(occupied)
    told = {
        size: statistics.median(own) / service_ms
        for size, own in times.items()
        if len(own) >= FEWEST_EXTRA
    }
    if not told:
        return {}
    sizes = np.array(sorted(told))
    costs = np.array([told[size] for size in sizes])
    if len(sizes) == 1:
        return {int(sizes[0]): float(costs[0])}
    slope, start = np.polyfit(sizes, costs, 1)
    line = {size: max(0.0, start + slope * size) for size in range(1, seen.rules.k + 1)}
    return {size: round(float(cost), 4) for size, cost in {**line, **told}.items()}
