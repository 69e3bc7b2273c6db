"""What a simulation came to: percentiles and shares with 95 % confidence intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from codedinvnet.common.quantiles import around, clustered_ci, percentile, rounded
from codedinvnet.simulation.engine import Records, Simulation
from codedinvnet.simulation.scenario import Scenario
from codedinvnet.simulation.warnings import drifts

SCHEMA = 1
QUANTILES = {"p50": 0.5, "p99": 0.99, "p995": 0.995, "p999": 0.999}
SECTIONS = 30
"""Consecutive stretches of a run that intervals come from, at most."""
FEWEST_SECTIONS = 5
"""With fewer there is no interval."""
TAIL = 10
"""Requests beyond a percentile that a section must hold in the mean."""
HIDDEN = ("schema_version", "kind", "scenario", "notes")
"""Keys of a report that get no line of their own."""


class Estimate(NamedTuple):
    """A value, and its 95 % interval if the run was long enough for one."""

    value: float
    interval: tuple[float, float] | None


def estimate(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], sections: int
) -> Estimate:
    """Estimate a statistic of values (n,) in order of time, and how sure it is.

    By sectioning: the run is cut into consecutive stretches, long enough to be nearly independent
    though neighbouring requests are not, and the statistic's scatter over them gives the interval
    around the whole run's (Asmussen and Glynn, Stochastic Simulation, 2007, section III.5a).
    """
    whole = statistic(values)
    half = clustered_ci(_by_section(values, statistic, sections), centre=whole)
    return Estimate(whole, None if half is None else (whole - half, whole + half))


def _by_section(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], sections: int
) -> list[float]:
    """Return a statistic of each section; [] if there are too few for an interval."""
    if sections < FEWEST_SECTIONS:
        return []
    return [statistic(part) for part in np.array_split(values, sections)]


def sections_for(count: int, share: float) -> int:
    """Return into how many sections `count` values are cut for a percentile."""
    return min(SECTIONS, int(count * min(share, 1 - share) / TAIL))


def no_interval(count: int, share: float) -> str:
    """Return why a percentile of `count` values that is finite has no interval."""
    if sections_for(count, share) < FEWEST_SECTIONS:
        return "the run is too short for an interval"
    return "lost answers leave no interval"


def percentile_of(latency: np.ndarray, share: float) -> Estimate:
    """Return a percentile of the latencies (n,) of a run, in order of time.

    The interval is by sectioning on the logarithm: a tail is off by a factor, and never below 0.
    There is none around a percentile of 0.
    """
    whole = percentile(latency, share)
    sections = sections_for(len(latency), share)
    parts = _by_section(latency, lambda part: percentile(part, share), sections)
    return Estimate(whole, around(parts, whole))


def share_of(values: np.ndarray, sections: int, count: int) -> Estimate:
    """Return the mean of shares (n,) in 0..1, in order of time, of `count` things in all.

    Where none or all of these have what is counted, the interval is by the rule of three (Hanley
    and Lippman-Hand, JAMA 1983).
    """
    found = estimate(values, lambda part: float(np.mean(part)), sections)
    if found.value in (0, 1):
        least = min(1.0, 3 / count)
        return Estimate(found.value, (0.0, least) if found.value == 0 else (1 - least, 1.0))
    if found.interval is None:
        return found
    low, high = found.interval
    return Estimate(found.value, (max(0.0, low), min(1.0, high)))


def counted(records: Records, scenario: Scenario) -> np.ndarray:
    """Return the latencies (n,) in ms of the requests that count, those after the warm-up."""
    latency: np.ndarray = 1000 * records.latency[len(records.latency) - scenario.counted :]
    return latency


def summarise(records: Records, scenario: Scenario) -> dict[str, Any]:
    """Return the figures of a run; times in ms, None for one that some requests never reached.

    A request with a query that was not answered counts as infinitely late. `decoded_share` is of
    the answers, `missing_share` of the requests.
    """
    latency = counted(records, scenario)
    first = len(records.latency) - len(latency)
    found: dict[str, Any] = {}

    def put(name: str, measured: Estimate, digits: int) -> None:
        found[name] = rounded(measured.value, digits)
        interval = measured.interval
        found[f"{name}_95"] = interval and [round(bound, digits) for bound in interval]

    for name, share in QUANTILES.items():
        put(f"{name}_ms", percentile_of(latency, share), 3)
    stretches = min(SECTIONS, len(latency))
    answers = int(records.sizes[first:].sum())
    shares: dict[str, tuple[np.ndarray, int]] = {
        "decoded_share": (records.decoded / records.sizes, answers),
        # Lost by the request: of ten images of one no two are lost for themselves.
        "missing_share": (records.missing / records.sizes, len(latency)),
    }
    for name, (values, count) in shares.items():
        put(name, share_of(values[first:], stretches, count), 6)
    queries = int(records.sizes.sum())
    ideal = queries * scenario.mean_ms / 1000
    utilisation = records.busy / (scenario.workers * scenario.at_once * records.seconds)
    return {
        **found,
        "requests": len(records.latency),
        "queries": queries,
        "work_per_query": round(records.computing / ideal, 4),
        "tasks_per_query": round(records.tasks / queries, 4),
        "hedges_per_query": round(records.hedges / queries, 4),
        "drifting": drifts(latency, utilisation),
        "utilisation": round(utilisation, 4),
        "workers_replaced": records.replaced,
        "simulated_seconds": round(records.seconds, 3),
    }


def simulate(scenario: Scenario, progress: bool = False) -> dict[str, Any]:
    """Simulate a scenario and return its figures, with what the simulation itself took."""
    simulation = Simulation(scenario)
    began = time.process_time()
    records = simulation.run(progress)
    seconds = time.process_time() - began
    figures = summarise(records, scenario)
    return {
        "schema_version": SCHEMA,
        "kind": "simulated",
        "scenario": scenario.model_dump(mode="json", exclude_defaults=True),
        "load": round(scenario.arrivals.qps / scenario.capacity_qps, 4),
        "busy_workers": round(scenario.busy_workers, 2),
        **figures,
        "cpu_seconds": round(seconds, 2),
        "cpu_seconds_per_million": round(1e6 * seconds / figures["queries"], 1),
    }


def aligned(rows: Iterable[Mapping[str, Any]], formats: Mapping[str, str] = {}) -> list[str]:
    """Return rows as the lines of a table; what is not known is a dash.

    Args:
        rows: column -> value; the first row has all columns.
        formats: column -> format specification of its numbers; other columns hold text.
    """
    table = list(rows)
    columns = []
    for name in table[0]:
        form, values = formats.get(name), [row.get(name) for row in table]
        cells = [name, *("-" if v is None else format(v, form or "") for v in values)]
        width = max(map(len, cells))
        columns.append([c.ljust(width) if form is None else c.rjust(width) for c in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def figure_lines(row: Mapping[str, Any], scenario: Scenario) -> list[str]:
    """Return the lines of `simulate`'s report: its notes, its figures, and the scenario as JSON."""
    lines = [*row["notes"], *([""] if row["notes"] else [])]
    for key, value in row.items():
        if key in HIDDEN or key.endswith("_95"):
            continue
        share = QUANTILES.get(key.removesuffix("_ms"))
        shown = str(value)
        if value is None:
            shown = "not known" if share is None else "never: too many requests were lost"
        elif interval := row.get(f"{key}_95"):
            shown += f"  ({interval[0]} to {interval[1]})"
        elif f"{key}_95" in row:
            shown += f"  ({no_interval(scenario.counted, share or 0.5)})"
        lines.append(f"{key:<24} {shown}")
    return [*lines, f"{'scenario':<24} {json.dumps(row['scenario'])}"]
