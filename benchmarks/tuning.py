"""`python -m benchmarks tuning`: what happens when one of the scheduler's numbers is another?

Each number of `Tuning` is halved and doubled, and rules are switched off, in the simulator's cells.
A cell has *moved* if its p50, p99 or p99.9 lies further from the usual one than the seeds of the
usual one lie from one another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np
from pandas import DataFrame

from codedinvnet.codes.named_policies import served_as
from codedinvnet.common.errors import UserError, nearest
from codedinvnet.common.progress import Progress
from codedinvnet.evaluation import tables
from codedinvnet.scheduler.tuning import TUNING, Tuning
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers

SERVICE = 10.0
"""Milliseconds of a task."""
SHARES = (0.5, 0.99, 0.999)
"""Of the requests, that took no longer than the quantiles that are compared."""
SMALLEST = 0.01
"""A change of less moves nothing, whatever the noise."""
NEVER = 10**9
OFF: Mapping[str, Mapping[str, float]] = {
    "nothing probes behind a late task": {"overtaking_probe": NEVER},
    "copies of very late queries are no kind of their own": {"later": NEVER},
    "copies are sent where they do not pay": {"worth": 0.0},
    "extra tasks never yield": {"yields_after": NEVER, "yields_at": NEVER},
    "nothing is held in reserve for late queries": {"reserve": 0.0},
    "no worker is passed by for being slow": {"slow": NEVER},
    "no worker drains to time a task alone": {"alone_after": NEVER},
    "no worker gets more than it computes": {"ahead": NEVER},
}
"""Rules, and the numbers that switch them off."""

Row: TypeAlias = tuple[float, ...]
"""Logarithms of the quantiles, and of the work."""


def run(numbers: Sequence[str], *, seeds: int, queries: int) -> dict[str, Any]:
    """Return the table: a line for each change.

    Args:
        numbers: names of `Tuning` to change; all, and the rules, if empty.
        seeds: how many.
        queries: of each run.

    Raises:
        UserError: if there is no such number.
    """
    known = [field.name for field in dataclasses.fields(Tuning)]
    for name in numbers:
        if name not in known:
            raise UserError(
                f"{name!r} is no number of Tuning, did you mean {nearest(name, known)}?"
            )
    named = dict(cells(queries))
    usual = {cell: _rows(scenario, TUNING, seeds) for cell, scenario in named.items()}
    lines = []
    for title, tuning in Progress(list(changes(numbers or known, bool(numbers))), desc="tuning"):
        found = {cell: _rows(scenario, tuning, seeds) for cell, scenario in named.items()}
        lines.append({"change": title, **_compared(usual, found)})
    return {"rows": lines, "table": tables.markdown(DataFrame(lines))}


def changes(names: Sequence[str], some: bool) -> Iterator[tuple[str, Tuning]]:
    """Yield changes of numbers, and of rules unless only some numbers are asked for."""
    for name in names:
        usual = getattr(TUNING, name)
        for factor in (0.5, 2.0):
            value = _scaled(name, usual, factor)
            if value != usual:
                yield f"{name} {usual:g} → {value:g}", _changed({name: value})
    for title, numbers in {} if some else OFF.items():
        yield title, _changed(numbers)


def _changed(numbers: Mapping[str, float]) -> Tuning:
    return dataclasses.replace(TUNING, **numbers)  # type: ignore[arg-type]


def _scaled(name: str, usual: float, factor: float) -> float:
    """Return a number times a factor; of a share near 1 it is the rest that is scaled."""
    if name in ("normal", "late", "serial", "codes_busy"):
        return 1.0 - (1.0 - usual) * factor if usual > 0.5 else usual * factor
    if name in ("late_factor", "slow", "latest"):  # 1 is no difference
        return 1.0 + (usual - 1.0) * factor
    return max(1, round(usual * factor)) if isinstance(usual, int) else usual * factor


def cells(queries: int) -> Iterator[tuple[str, Scenario]]:
    """Yield names and scenarios: servers behind the gateway, and workers of `serve`."""

    def cell(workers: int, busy: float, model: str, rules: Mapping[str, Any]) -> Scenario:
        rate = busy * workers * (rules.get("cores") or 1) / SERVICE * 1000
        faults = [fault.model_dump() for fault in stragglers(model, SERVICE, 1)]
        times = {"service": SERVICE, "trip": 1.0, "encode": 0.2}
        load = {"arrivals": {"qps": rate}, "queries": queries, "stragglers": faults}
        return parse_scenario({"workers": workers, "k": 10, **times, **load, **rules}, "tuning")

    gateway: dict[str, Any] = {"policy": "hedge", "slots": None, "cores": 1}
    places = (("none", 0.9), ("pareto", 0.4), ("pareto", 0.7), ("held", 0.8), ("bursts", 0.4))
    for model, busy in (*places, ("slower", 0.7)):
        yield f"gateway, {model}, {busy:.0%}", cell(8, busy, model, gateway)
    times = {"distribution": "exponential", "ms": SERVICE}
    for cores, busy in ((1, 0.6), (4, 0.8)):
        rules = {**gateway, "service": times, "cores": cores}
        yield (
            f"gateway, exponential times, {cores} at once, {busy:.0%}",
            cell(8, busy, "none", rules),
        )
    long = {**gateway, "long_share": 0.1}
    yield "gateway, a tenth is long, 40%", cell(8, 0.4 / 1.9, "none", long)
    for model, shape, busy in (("pareto", 0.3, 0.4), ("bursts", 0.6, 0.4)):
        rules = {**gateway, "service": {"distribution": "lognormal", "ms": SERVICE, "shape": shape}}
        yield (
            f"gateway, {model}, times vary by {shape:.0%}, {busy:.0%}",
            cell(11, busy, model, rules),
        )
    served = (
        *(("hedge", "pareto", 0.5), ("hedge", "bursts", 0.4), ("hedge", "hung", 0.4)),
        *(("coded+hedge", "exponential", 0.4), ("coded", "bursts", 0.5)),
        *(("auto", "pareto", 0.5), ("auto+coded-invnet", "exponential", 0.3)),
    )
    for policy, model, busy in served:
        rules = dict(served_as(policy).scenario)
        yield f"serve, {policy}, {model}, {busy:.0%}", cell(12, busy, model, rules)
    calls = {**served_as("hedge").scenario, "worker_batch": 4, "batch_fixed": 0.5}
    yield "serve, hedge, calls of four, bursts, 60%", cell(11, 0.6, "bursts", calls)


def _rows(scenario: Scenario, tuning: Tuning, seeds: int) -> list[Row]:
    """Return what a cell came to with each seed."""
    rows = []
    for seed in range(1, seeds + 1):
        seeded = scenario.updated(seed=seed)
        found = Simulation(seeded, tuning=tuning).run()
        latency = np.sort(found.latency[scenario.requests - scenario.counted :])
        late = [latency[min(len(latency) - 1, int(share * len(latency)))] for share in SHARES]
        rows.append((*map(math.log, late), math.log(found.computing)))
    return rows


def _compared(
    usual: Mapping[str, list[Row]], found: Mapping[str, list[Row]]
) -> dict[str, str | int]:
    """Return how many cells have moved, and by how much: the mean, and the farthest of them."""
    moved, shifts = 0, dict[str, list[float]]()
    for cell, before in usual.items():
        own = []
        for old, new in zip(zip(*before, strict=True), zip(*found[cell], strict=True), strict=True):
            shift = fmean(new) - fmean(old)
            noise = stdev(old) if len(old) > 1 else 0.0
            own.append(shift if abs(shift) > max(noise, SMALLEST) else 0.0)
        moved += any(own[:-1])
        shifts[cell] = own
    line: dict[str, str | int] = {"moved": moved}
    for place, name in enumerate(("p50", "p99", "p99.9", "work")):
        by = {cell: own[place] for cell, own in shifts.items()}
        low, high = min(by, key=by.__getitem__), max(by, key=by.__getitem__)
        told = [f"{math.exp(by[c]):.2f} ({c})" for c in dict.fromkeys((low, high)) if by[c]]
        line[name] = ", ".join(told)
    return line
