"""Measured runs: their rows, the scenarios that repeat them, and how well they are met.

A row is one JSON object of a JSONL file. What it must hold is `MeasuredRun`; other keys (commit,
machine, time) may stand beside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError

from codedinvnet.config import Positive, Section, describe
from codedinvnet.errors import UserError
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.scenario import Scenario, Straggler

COMPARED = ("p50", "p99", "p999")
TOLERANCE = 0.15
"""A simulated percentile is good within so much of the measured one, or within its interval."""


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
    backup: bool = False
    routing: str = "least-loaded"
    qps: float
    """Images a second."""
    batch: Positive = 1
    requests: Positive
    deadline_ms: float = 5000.0
    group_timeout_ms: float = 20.0
    hang_timeout_ms: float = 3000.0
    stragglers: tuple[Straggler, ...] = ()
    """The faults that were injected, as in a faults file."""
    service: Distribution | None = None
    encode: Distribution | None = None
    trip: Distribution | None = None
    front_end: Distribution | None = None
    decode: Distribution | None = None
    p50_ms: float | None
    """None of a percentile: so many requests were never answered, or the run was too short."""
    p50_ms_95: tuple[float, float] | None = None
    p99_ms: float | None
    p99_ms_95: tuple[float, float] | None = None
    p999_ms: float | None = None
    p999_ms_95: tuple[float, float] | None = None


SETTINGS = ("name", "policy", "workers", "k", "r", "backup", "routing", "stragglers")
RULES = ("deadline_ms", "group_timeout_ms", "hang_timeout_ms")
TIMES = ("service", "encode", "trip", "front_end", "decode")


def read_runs(path: Path) -> list[MeasuredRun]:
    """Read measured runs: JSONL rows of kind `latency`; others are passed over.

    Raises:
        UserError: if there are none, or one is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the measured runs {path}: {error}") from error
    try:
        lines = enumerate(text.splitlines(), start=1)
        rows = [(f"{path}, line {i}", json.loads(line)) for i, line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSONL: {error}") from error
    runs = []
    for where, row in rows:
        if isinstance(row, dict) and (row.get("kind") != "latency" or row.get("error")):
            continue
        try:
            runs.append(MeasuredRun.model_validate(row))
        except ValidationError as error:
            raise UserError(f"{where}: {describe(error, MeasuredRun, row)}") from error
    if not runs:
        raise UserError(f"{path} holds no row of kind 'latency'")
    return runs


def scenario_of(run: MeasuredRun, base: Scenario) -> Scenario:
    """Return the scenario that repeats a run; what the run does not say is the base's.

    More requests are simulated than were measured if the base says so, since the simulation has no
    reason to be as uncertain.

    Raises:
        UserError: if the run's settings do not fit together.
    """
    raw = run.model_dump()
    changes = {key: raw[key] for key in (*SETTINGS, *RULES)}
    changes |= {key: raw[key] for key in TIMES if raw[key] is not None}
    queries = max(base.queries, run.requests * run.batch)
    return base.updated(qps=run.qps, batch=run.batch, queries=queries, **changes)


def compare(run: MeasuredRun, figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each percentile what was measured and simulated, and whether they agree.

    They agree within 15 % of the measured value or within its 95 % interval, whichever is wider.
    """
    found = {}
    for name in COMPARED:
        measured: float | None = getattr(run, f"{name}_ms")
        if measured is None:
            continue
        low, high = getattr(run, f"{name}_ms_95") or (measured, measured)
        low, high = min(low, (1 - TOLERANCE) * measured), max(high, (1 + TOLERANCE) * measured)
        simulated = figures[f"{name}_ms"]
        value = math.inf if simulated is None else simulated
        found[name] = {
            "measured_ms": measured,
            "simulated_ms": simulated,
            "allowed_ms": [round(low, 3), round(high, 3)],
            "agrees": low <= value <= high,
        }
    return found


def table(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of comparisons, and how many percentiles agree."""
    width = max(len(row["name"]) for row in comparisons)
    head = "  ".join(f"{name:>10} {'simulated':>10}   " for name in COMPARED)
    lines = [f"{'run':<{width}}  {head}"]
    agreed = total = 0
    for row in comparisons:
        cells = []
        for name in COMPARED:
            cell = row["percentiles"].get(name)
            if cell is None:
                cells.append(f"{'-':>10} {'-':>10}   ")
                continue
            agreed, total = agreed + cell["agrees"], total + 1
            simulated = cell["simulated_ms"]
            shown = "never" if simulated is None else f"{simulated:.1f}"
            mark = "ok" if cell["agrees"] else "no"
            cells.append(f"{cell['measured_ms']:>10.1f} {shown:>10} {mark}")
        lines.append(f"{row['name']:<{width}}  {'  '.join(cells)}")
    lines.append(
        f"{agreed} of {total} percentiles within {TOLERANCE:.0%} or the measured 95 % interval"
    )
    return lines
