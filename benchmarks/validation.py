"""`python -m benchmarks validation`: does the simulator agree with measured runs of the service?

Every row of `bench latency` is repeated with its settings, its faults and its arrivals. The times
that go in come from another run, of another policy if there is one, so that no run predicts itself.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.evaluation.grid import read_rows
from codedinvnet.evaluation.latency_tables import runs_of
from codedinvnet.evaluation.quantiles import Histogram, percentile, rounded
from codedinvnet.files import check_writable, file_digest, write_json
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.simulation.engine import Simulation, accuracy_of
from codedinvnet.simulation.figures import QUANTILES, TAIL, aligned, counted, latency_of
from codedinvnet.simulation.scenario import Scenario, load_scenario

SCHEMA = 4
COMPARED = ("p50", "p99", "p999")
NEAR = 0.15
"""A simulated percentile is near the measured one if it is off by at most this share."""
APART = 1.25
"""The order of two arms counts where one's percentile is at least so many times the other's."""
SIDES = ("measured_ms", "simulated_ms")
SETTINGS = ("name", "policy", "workers", "k", "r", "method", "stragglers")
RULES = ("deadline_ms", "group_timeout_ms", "hang_timeout_ms")
LOAD = ("qps", "batch", "requests")
TIMES = ("service", "encode", "trip", "front_end", "decode")
Row: TypeAlias = Mapping[str, Any]
Arm: TypeAlias = Sequence[Row]
"""Runs of the same settings, which differ only by chance."""


class Cell(NamedTuple):
    """A percentile of an arm in ms; infinite if more requests were lost."""

    measured: float
    simulated: float


def arms_of(rows: Iterable[Row]) -> list[Arm]:
    """Group the rows that the tables show into arms, in the order of their first rows.

    Raises:
        UserError: if there are none.
    """
    rows = list(rows)
    shown = set(runs_of(rows).get("key", ()))
    runs = {row["key"]: row for row in rows if row["error"] is None and row["key"] in shown}
    found: dict[str, list[Row]] = {}
    for run in runs.values():
        names = (*SETTINGS[1:], *RULES, *LOAD, "settings")
        arm = json.dumps([run.get(name) for name in names], sort_keys=True)
        found.setdefault(arm, []).append(run)
    if not found:
        raise UserError("there is no measured run to repeat")
    return list(found.values())


def name_of(arm: Arm) -> str:
    """Return the name of an arm's run, of several without its number."""
    name: str = arm[0]["name"]
    return name if len(arm) == 1 else re.sub(r",? run \d+$", "", name)


def place_of(run: Row) -> str:
    """Return what arms must share for their order to mean something."""
    return json.dumps([run.get(k) for k in ("workers", "stragglers", *LOAD, *RULES)])


def with_other_times(arms: Sequence[Arm]) -> list[Arm]:
    """Replace each run's times by those of another run, as similar as can be.

    Other arms come before the same arm, the same bundle, workers and k before others, and the same
    place before others. A time that no other run has is kept.
    """
    known = [(number, run) for number, arm in enumerate(arms) for run in arm]

    def replaced(number: int, run: Row) -> Row:
        def distance(entry: tuple[int, Row]) -> tuple[bool, bool, bool]:
            other, one = entry
            alike = all(one.get(key) == run.get(key) for key in ("bundle", "workers", "k"))
            return other == number, not alike, place_of(arms[other][0]) != place_of(arms[number][0])

        others = [one for _, one in sorted(known, key=distance) if one is not run]
        times = {
            name: next((time for one in others if (time := one.get(name))), run[name])
            for name in TIMES
            if run.get(name) is not None
        }
        return {**run, **times}

    return [[replaced(number, run) for run in arm] for number, arm in enumerate(arms)]


def scenarios_of(arm: Arm, base: Scenario) -> list[list[Scenario]]:
    """Return for each run the scenarios that repeat it, each with other draws.

    They meet the run's own arrivals, and are repeated until there are as many requests as the base
    has queries: the few slowest of a thousand requests at high load depend on the arrivals most.
    """
    found = []
    for place, run in enumerate(arm):
        names = (*SETTINGS, *RULES, *TIMES)
        changes = {name: run[name] for name in names if run.get(name) is not None}
        changes["bundle"] = run.get("bundle") if run.get("apart") else None
        changes |= {"kind": "poisson", "gaps_seed": run["seed"], "warmup": 0.0}
        load = {"qps": run["qps"], "batch": run["batch"], "queries": run["batch"] * run["requests"]}
        scenario = base.updated(**load, **changes)
        repeats = math.ceil(base.queries / run["requests"])
        seeds = range(base.seed + place, base.seed + place + repeats * len(arm), len(arm))
        found.append([scenario.updated(seed=seed) for seed in seeds])
    return found


def compare(arm: Arm, simulated: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Return measured and simulated percentiles of an arm's requests, all runs together.

    None means that more requests were lost. Percentiles with fewer than ten measured requests
    beyond them are left out.

    Args:
        arm: the measured runs.
        simulated: latencies in ms, (n,).
    """
    latencies = reduce(add, (Histogram.of_row(run) for run in arm))
    return {
        name: {
            "measured_ms": rounded(latencies.percentile(QUANTILES[name]), 3),
            "simulated_ms": rounded(percentile(simulated, QUANTILES[name]), 3),
        }
        for name in COMPARED
        if (1 - QUANTILES[name]) * latencies.total >= TAIL
    }


def tally(arms: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return for each percentile how well the arms of a report agree.

    The figures are: how many arms were compared, the share of them within NEAR, the median error,
    and for pairs of arms of one place that are APART the share in the measured order. `wrong` has
    the same figures if every arm is compared with the simulation of another policy of its place. An
    error is a share of the measured percentile, and infinite if only one of the two is infinite.
    """
    found = {}
    for name in COMPARED:
        places: dict[str, list[Cell]] = {}
        for arm in arms:
            if name in arm["percentiles"]:
                known = arm["percentiles"][name]
                cell = Cell(*(latency_of(known[side]) for side in SIDES))
                places.setdefault(arm["place"], []).append(cell)
        right = [cell for cells in places.values() for cell in cells]
        wrong = [
            Cell(a.measured, b.simulated)
            for cells in places.values()
            for a, b in itertools.permutations(cells, 2)
        ]
        pairs = [
            (cells, a, b)
            for cells in places.values()
            for a, b in itertools.combinations(cells, 2)
            if a.measured != b.measured
            and max(a.measured, b.measured) >= APART * min(a.measured, b.measured)
        ]
        ordered = [_in_order(a, b, a, b) for _, a, b in pairs]
        misordered = [
            _in_order(a, b, c, d)
            for cells, a, b in pairs
            for c, d in itertools.permutations(cells, 2)
            if c is not a and d is not b
        ]
        if errors := _errors(right):
            found[name] = {
                "compared": len(errors),
                **_figures(errors, ordered),
                "pairs": len(ordered),
                "wrong": _figures(_errors(wrong), misordered),
            }
    return found


def _errors(cells: Iterable[Cell]) -> list[float]:
    return [
        math.inf if math.inf in cell else abs(cell.simulated / cell.measured - 1)
        for cell in cells
        if cell != (math.inf, math.inf)
    ]


def _in_order(a: Cell, b: Cell, c: Cell, d: Cell) -> bool:
    """Return whether the simulations of c and d come in the measured order of a and b."""
    return (a.measured > b.measured) == (c.simulated > d.simulated)


def _figures(errors: Sequence[float], ordered: Sequence[bool]) -> dict[str, float | None]:
    error = statistics.median(errors) if errors else math.inf
    return {
        "near": _share([error <= NEAR for error in errors]),
        "median_error": rounded(error, 4),
        "in_order": _share(ordered),
    }


def _share(hits: Sequence[bool]) -> float | None:
    return round(statistics.fmean(hits), 4) if hits else None


def shown(figures: Row) -> dict[str, Any]:
    """Return the columns of a table for one percentile of a tally."""
    titles = {"near": f"within {NEAR:.0%}", "median_error": "median error"}
    titles["in_order"] = "pairs in order"
    return {
        "arms": figures["compared"],
        "pairs": figures["pairs"],
        **{
            title + suffix: "-" if of[key] is None else f"{of[key]:.1%}"
            for key, title in titles.items()
            for suffix, of in (("", figures), (", wrong policy", figures["wrong"]))
        },
    }


def table(arms: Sequence[Row]) -> str:
    """Return the table of a report's arms, in ms, and how well percentiles agree."""
    columns = {
        f"{name} {side.removesuffix('_ms')}": (name, side) for name in COMPARED for side in SIDES
    }
    lines = []
    for row in arms:
        known = row["percentiles"]
        cells = {
            column: latency_of(known[name][side]) if name in known else None
            for column, (name, side) in columns.items()
        }
        lines.append({"arm": row["name"], "runs": row["runs"], **cells})
    agreement = [{"percentile": name, **shown(one)} for name, one in tally(arms).items()]
    formats = dict.fromkeys(columns, ".1f")
    return "\n".join([*aligned(lines, formats), "", *(aligned(agreement) if agreement else [])])


def run(*, scenario: Path, measured: Path, out: Path | None, queries: int | None) -> dict[str, Any]:
    """Simulate the measured runs, and compare arm by arm.

    Raises:
        UserError: if a file is wrong, before anything is simulated.
    """
    if out is not None:
        check_writable(out)
    base = load_scenario(scenario)
    base = base if queries is None else base.updated(queries=queries)
    arms, accuracy = arms_of(read_rows(measured, "latency")), accuracy_of(base)
    repeated = [scenarios_of(arm, base) for arm in with_other_times(arms)]
    rows = []
    for arm, runs in zip(arms, repeated, strict=True):
        latencies = np.concatenate(
            [counted(Simulation(one, accuracy).run(True), one) for own in runs for one in own]
        )
        rows.append(
            {
                "name": name_of(arm),
                "place": place_of(arm[0]),
                "runs": len(arm),
                "percentiles": compare(arm, latencies),
                "simulated_requests": len(latencies),
            }
        )
    report = {
        "schema_version": SCHEMA,
        "kind": "validation",
        "measured": str(measured),
        "measured_digest": file_digest(measured),
        "base": base.model_dump(mode="json", exclude_defaults=True),
        "percentiles": tally(rows),
        "arms": rows,
        "machine": describe_machine(),
        "commit": describe_commit(),
    }
    if out is not None:
        write_json(out, report)
    return {**report, "table": table(rows)}
