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
from pandas import DataFrame
from pydantic import ConfigDict, Field, model_validator

from codedinvnet.codes.registry import OURS
from codedinvnet.config import Positive, Section, validated
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import weights_digest
from codedinvnet.quantiles import Histogram, percentile, rounded
from codedinvnet.rows import current_accuracy, current_latency, is_latency_row, read_rows
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.figures import QUANTILES, TAIL, aligned, latency_of
from codedinvnet.simulation.scenario import Scenario, Straggler

LINE = ("invertible", 1, 0)
"""Base model, missing and corrupt workers of the rows that tell a method's accuracy."""
SCHEMA = 3
"""Version of the comparison that `simulate --measured` writes."""
COMPARED = ("p50", "p99", "p999")
NEAR = 0.15
"""A simulated percentile is near the measured one within so much of it."""
APART = 1.25
"""The order of two arms is judged where one's percentile is so many times the other's."""


class Cell(NamedTuple):
    """A percentile of an arm in ms; infinite if more requests were lost."""

    place: str
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
    backup: bool = False
    """Rows of before say so, and not by the method."""
    apart: bool = False
    """Whether the code of the bundle keeps the members apart."""
    bundle: str | None = None
    routing: str = "least-loaded"
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


SETTINGS = ("name", "policy", "workers", "k", "r", "method", "backup", "routing", "stragglers")
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
    changes |= {"apart": run.apart, "bundle": run.bundle if run.apart else None}
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

    The figures are: how many were compared, how many of them are within NEAR, the median error, and
    how many pairs of arms with the same load and stragglers come in the measured order, of those
    that are APART. An error is a share of the measured percentile, and infinite if one of the two
    is without end; where both are, nothing is compared.
    """
    found = {}
    for name in COMPARED:
        cells = [
            Cell(arm["place"], *(latency_of(arm["percentiles"][name][side]) for side in SIDES))
            for arm in arms
            if name in arm["percentiles"]
        ]
        errors = [
            math.inf if math.inf in cell else abs(cell.simulated / cell.measured - 1)
            for cell in cells
            if (cell.measured, cell.simulated) != (math.inf, math.inf)
        ]
        if not errors:
            continue
        judged = [
            (a.measured > b.measured, a.simulated > b.simulated)
            for a, b in itertools.combinations(cells, 2)
            if a.place == b.place
            and a.measured != b.measured
            and max(a.measured, b.measured) >= APART * min(a.measured, b.measured)
        ]
        found[name] = {
            "compared": len(errors),
            "near": sum(error <= NEAR for error in errors),
            "median_error": round(statistics.median(errors), 4),
            "pairs": len(judged),
            "in_order": sum(measured == simulated for measured, simulated in judged),
        }
    return found


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
    formats = dict.fromkeys(columns, ".1f")
    agreement = [
        {
            "percentile": name,
            "within 15 %": f"{found['near']} of {found['compared']}",
            "median error": f"{found['median_error']:.1%}",
            "pairs in order": f"{found['in_order']} of {found['pairs']}",
        }
        for name, found in tally(comparisons).items()
    ]
    return [*aligned(lines, formats), "", *(aligned(agreement) if agreement else [])]


def accuracy_of_methods(rows: Path, bundle: str) -> dict[str, dict[int, float]]:
    """Return method -> k -> what rows of `bench accuracy` say of the answers that it makes up.

    Args:
        rows: JSONL.
        bundle: whose classifier the methods protect; of other weights no row counts.

    Raises:
        UserError: if there is no such file or bundle, or no row of it.
    """
    if not rows.is_file():
        raise UserError(f"--accuracy-rows: there is no file {rows}")
    weights = weights_digest(bundle)
    own = [
        row
        for row in read_rows(rows, "accuracy")
        if row["settings"].get("bundle") == weights and not row["settings"].get("quick")
    ]
    told = DataFrame(
        {"method": row["method"], "k": row["k"], "recovered": row["recovered"]}
        for row in current_accuracy(own)
        if row["error"] is None
        and (row["base"], row["missing"], row["corrupt"]) == LINE
        and row["label"] == row["method"]
        and row["recovered"] is not None
    )
    if told.empty:
        raise UserError(
            f"--accuracy-rows: {rows} holds no method of the bundle {bundle!r} that was measured "
            "in full (not by --quick)"
        )
    return {
        str(name): own.groupby("k")["recovered"].mean().to_dict()
        for name, own in told.groupby("method")
    }
