"""Measured runs: their rows, the scenarios that repeat them, and how well they are met.

A row is one JSON object of a JSONL file. What it must hold is `MeasuredRun`; other keys (commit,
machine, time) may stand beside.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from codedinvnet.codes.registry import OURS
from codedinvnet.config import Positive, Section, validated
from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import Histogram, percentile, rounded
from codedinvnet.rows import current_latency, is_latency_row, read_rows
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.figures import QUANTILES, TAIL, aligned, latency_of
from codedinvnet.simulation.scenario import Scenario, Straggler

SCHEMA = 4
"""Version of the comparison that `simulate --measured` writes."""
COMPARED = ("p50", "p99", "p999")
NEAR = 0.15
"""A simulated percentile is near the measured one within so much of it."""
APART = 1.25
"""The order of two arms is judged where one's percentile is so many times the other's."""


class Cell(NamedTuple):
    """A percentile of an arm in ms; infinite if more requests were lost."""

    measured: float
    simulated: float


SIDES = ("measured_ms", "simulated_ms")


class MeasuredRun(Section):
    """One run of the real service: its settings, its times, what came out. Times are in ms.

    `service`, `encode`, `trip` and `front_end` are fitted distributions, best as quantiles of what
    the workers reported (`{"distribution": "empirical", "values_ms": […]}`); those that are absent
    come from the scenario.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1]
    kind: Literal["latency"]
    name: str
    policy: str
    workers: Positive
    k: Positive
    r: Positive = 1
    method: str = OURS
    apart: bool = False
    """Whether the code of the bundle keeps the members apart."""
    bundle: str | None = None
    qps: float
    """Images a second."""
    batch: Positive = 1
    requests: Positive
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of `poisson_gaps`, which drew when requests came: the simulation's come then, too."""
    deadline_ms: float = 5000.0
    group_timeout_ms: float = 20.0
    hang_timeout_ms: float | None = None
    stragglers: tuple[Straggler, ...] = ()
    """The faults that were injected, as in a faults file."""
    service: Distribution | None = None
    encode: Distribution | None = None
    trip: Distribution | None = None
    front_end: Distribution | None = None
    decode: Distribution | None = None
    latencies: Histogram
    """Of the requests: a row says them by its histogram, or one by one in `latencies_ms`."""
    key: str | None = None
    """Of the newest row of several with one key alone it is true that the run was measured so."""
    settings: Any = None
    """What else the run depends on; runs of one arm have the same."""

    @model_validator(mode="before")
    @classmethod
    def _with_latencies(cls, row: Any) -> Any:
        """Take the latencies from where the row has them."""
        if not isinstance(row, dict):
            return row
        if (found := row.get("latencies_ms")) is not None:
            latencies = Histogram.of([math.inf if ms is None else ms for ms in found])
        elif "histogram" in row:
            latencies = Histogram.of_row(row)
        else:
            raise ValueError("missing key 'histogram' or 'latencies_ms'")
        return {**row, "latencies": latencies}


@dataclass(frozen=True)
class MeasuredArm:
    """Runs of the same settings, which differ by chance alone."""

    runs: tuple[MeasuredRun, ...]

    @property
    def name(self) -> str:
        """The name of a run, of several without its number."""
        name = self.runs[0].name
        return name if len(self.runs) == 1 else re.sub(r",? run \d+$", "", name)

    @property
    def seeded(self) -> bool:
        """Whether the arrivals of all runs are known."""
        return all(run.seed is not None for run in self.runs)

    @property
    def latencies(self) -> Histogram:
        """Of all runs' requests."""
        return reduce(add, (run.latencies for run in self.runs))


SETTINGS = ("name", "policy", "workers", "k", "r", "method", "stragglers")
RULES = ("deadline_ms", "group_timeout_ms", "hang_timeout_ms")
LOAD = ("qps", "batch", "requests")
TIMES = ("service", "encode", "trip", "front_end", "decode")


def read_runs(path: Path) -> list[MeasuredRun]:
    """Read measured runs: rows of kind `latency` that did not fail; others are passed over.

    Of the rows of `bench latency` those are taken that its tables show.

    Raises:
        UserError: if the file cannot be read, or holds no runs, or a wrong one.
    """
    if not path.is_file():
        raise UserError(f"cannot read the measured runs {path}: No such file")
    rows = [{**row, "line": line} for line, row in enumerate(read_rows(path), start=1)]
    rows = [row for row in rows if row.get("kind") == "latency"]
    benched = [row for row in rows if is_latency_row(row)]
    older = {row["line"] for row in benched} - {row["line"] for row in current_latency(benched)}
    runs = [
        validated(MeasuredRun, row, f"{path}, line {row['line']}")
        for row in rows
        if not row.get("error") and row["line"] not in older
    ]
    if not runs:
        raise UserError(f"{path} holds no row of kind 'latency'")
    return runs


def arms_of(runs: Iterable[MeasuredRun]) -> list[MeasuredArm]:
    """Put runs of the same settings together, in the order of the first of each.

    Of rows with the same key the last one counts.
    """
    newest = {run.key or f"line {place}": run for place, run in enumerate(runs)}
    found: dict[str, list[MeasuredRun]] = {}
    for run in newest.values():
        arm = run.model_dump(mode="json", include={*SETTINGS, *RULES, *LOAD, "settings"})
        del arm["name"]
        found.setdefault(json.dumps(arm, sort_keys=True), []).append(run)
    return [MeasuredArm(tuple(own)) for own in found.values()]


def with_others_times(arms: Sequence[MeasuredArm]) -> list[MeasuredArm]:
    """Return the arms with times that were measured in other runs than their own.

    The first run is taken that has such a time: of another arm of the same place, else of one of
    another place, else of the same arm. A time that no other run has is kept.
    """
    known = [(arm, run) for arm in arms for run in arm.runs]

    def borrowed(arm: MeasuredArm, run: MeasuredRun) -> MeasuredRun:
        def distance(other: tuple[MeasuredArm, MeasuredRun]) -> tuple[bool, bool, bool]:
            away, one = place_of(other[0]) != place_of(arm), other[1]
            unlike = (one.bundle, one.workers, one.k) != (run.bundle, run.workers, run.k)
            return other[0] is arm, unlike, away

        others = [one for _, one in sorted(known, key=distance) if one is not run]
        found = {
            name: next((time for one in others if (time := getattr(one, name))), own)
            for name in TIMES
            if (own := getattr(run, name)) is not None
        }
        return run.model_copy(update=found)

    return [MeasuredArm(tuple(borrowed(arm, run) for run in arm.runs)) for arm in arms]


def scenarios_of(arm: MeasuredArm, base: Scenario) -> list[list[Scenario]]:
    """Return for each of an arm's runs the scenarios that repeat it, each with other draws.

    One whose arrivals are known is repeated until there are as many requests as the base has
    queries: of the few slowest of a thousand requests at high load it is the arrivals that decide.

    Raises:
        UserError: if the settings do not fit together.
    """
    found = []
    for place, run in enumerate(arm.runs):
        scenario = scenario_of(run, base)
        repeats = 1 if run.seed is None else math.ceil(base.queries / run.requests)
        seeds = range(base.seed + place, base.seed + place + repeats * len(arm.runs), len(arm.runs))
        found.append([scenario.updated(seed=seed) for seed in seeds])
    return found


def scenario_of(run: MeasuredRun, base: Scenario) -> Scenario:
    """Return the scenario that repeats a run; what the run does not say is the base's.

    The very requests of a run whose arrivals are known; else as many as the base has queries, or as
    many as were measured: more have no reason to be as uncertain.

    Raises:
        UserError: if the run's settings do not fit together.
    """
    raw = run.model_dump()
    changes = {key: raw[key] for key in (*SETTINGS, *RULES)}
    changes |= {key: raw[key] for key in TIMES if raw[key] is not None}
    changes["bundle"] = run.bundle if run.apart else None
    queries = run.batch * max(base.queries, run.requests)
    if run.seed is not None:
        queries = run.batch * run.requests
        changes |= {"kind": "poisson", "gaps_seed": run.seed, "warmup": 0.0}
    return base.updated(qps=run.qps, batch=run.batch, queries=queries, **changes)


def compare(arm: MeasuredArm, simulated: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return percentiles of an arm's requests as measured and as simulated, all runs together.

    None stands for one without end, since more requests were lost. Percentiles beyond which fewer
    than ten measured requests lie are left out.

    Args:
        arm: what was measured.
        simulated: latencies in ms, (n,) of the requests of each run's simulation.
    """
    both, found = np.concatenate(simulated), {}
    for name in COMPARED:
        share = QUANTILES[name]
        if (1 - share) * arm.latencies.total >= TAIL:
            found[name] = {
                "measured_ms": rounded(arm.latencies.percentile(share), 3),
                "simulated_ms": rounded(percentile(both, share), 3),
            }
    return found


def tally(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each percentile how well arms agree, each with what `compare` returned.

    The figures are: how many were compared, the share of them within NEAR, the median error, and
    for pairs of arms of one place that are APART the share that comes in the measured order. Each
    stands beside what a wrong policy's simulation reaches, which is that of another arm of the
    place: all of them count. An error is a share of the measured percentile, and infinite if one of
    the two is without end; where both are, nothing is compared. None: there was nothing to compare.
    """
    found = {}
    for name in COMPARED:
        places: dict[str, list[Cell]] = {}
        for arm in arms:
            if name in arm["percentiles"]:
                known = arm["percentiles"][name]
                cell = Cell(*(latency_of(known[side]) for side in SIDES))
                places.setdefault(arm["place"], []).append(cell)
        right: list[Cell] = []
        wrong: list[Cell] = []
        ordered: list[bool] = []
        misordered: list[bool] = []
        for cells in places.values():
            right += cells
            wrong += [Cell(a.measured, b.simulated) for a, b in itertools.permutations(cells, 2)]
            for a, b in itertools.combinations(cells, 2):
                if not _apart(a, b):
                    continue
                ordered.append(_in_order(a, b, a, b))
                misordered += [
                    _in_order(a, b, c, d)
                    for c, d in itertools.permutations(cells, 2)
                    if c is not a and d is not b
                ]
        errors = _errors(right)
        if errors:
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


def _apart(a: Cell, b: Cell) -> bool:
    low, high = sorted((a.measured, b.measured))
    return low != high and high >= APART * low


def _in_order(a: Cell, b: Cell, c: Cell, d: Cell) -> bool:
    """Tell whether the simulations of c and d come in the measured order of a and b."""
    return (a.measured > b.measured) == (c.simulated > d.simulated)


def _figures(errors: Sequence[float], ordered: Sequence[bool]) -> dict[str, float | None]:
    error = statistics.median(errors) if errors else math.inf
    return {
        "near": _share([error <= NEAR for error in errors]),
        "median_error": rounded(error, 4),
        "in_order": _share(ordered),
    }


def _share(told: Sequence[bool]) -> float | None:
    return round(statistics.fmean(told), 4) if told else None


def place_of(arm: MeasuredArm) -> str:
    """Return what arms must have in common for their order to mean something."""
    run = arm.runs[0]
    words = run.model_dump(mode="json", include={"workers", "stragglers", *LOAD, *RULES})
    return json.dumps(words, sort_keys=True)


def table(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of comparisons, in ms, and how well percentiles agree."""
    columns = {
        f"{name} {side.removesuffix('_ms')}": (name, side) for name in COMPARED for side in SIDES
    }
    lines = []
    for row in comparisons:
        known = row["percentiles"]
        cells = {
            column: latency_of(known[name][side]) if name in known else None
            for column, (name, side) in columns.items()
        }
        lines.append({"arm": row["name"], "runs": row["runs"], **cells})
    agreement = [
        {"percentile": name, **told(figures)} for name, figures in tally(comparisons).items()
    ]
    formats = dict.fromkeys(columns, ".1f")
    return [*aligned(lines, formats), "", *(aligned(agreement) if agreement else [])]


def told(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return what people are told of one percentile of a tally, by title."""
    wrong, titles = figures["wrong"], {"near": f"within {NEAR:.0%}", "median_error": "median error"}
    titles["in_order"] = "pairs in order"
    return {
        "arms": figures["compared"],
        "pairs": figures["pairs"],
        **{
            title + suffix: "-" if of[key] is None else f"{of[key]:.1%}"
            for key, title in titles.items()
            for suffix, of in (("", figures), (", wrong policy", wrong))
        },
    }
