"""Measured runs: their rows, the scenarios that repeat them, and how well they are met.

A row is one JSON object of a JSONL file. What it must hold is `MeasuredRun`; other keys (commit,
machine, time) may stand beside.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from codedinvnet.codes.registry import OURS
from codedinvnet.config import Positive, Section, validated
from codedinvnet.errors import UserError
from codedinvnet.files import content_digest, parse_json
from codedinvnet.quantiles import percentile, rank_of, rounded
from codedinvnet.rows import current_latency, is_latency_row, is_whole
from codedinvnet.simulation.agreement import TOLERANCE, check, told
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.figures import (
    QUANTILES,
    TAIL,
    Estimate,
    RunPercentile,
    latencies_of,
    percentile_of_runs,
    pooled,
    sections_for,
)
from codedinvnet.simulation.scenario import Scenario, Straggler

SCHEMA = 2
"""Version of the comparison that `simulate --measured` writes."""
COMPARED = ("p50", "p99", "p999")
TOO_FEW = "no interval, and fewer than ten requests beyond the percentile"
NOT_MEASURED = "the rows have no such percentile"
NEVER = "more requests were lost than the percentile allows"


Percentile = Annotated[float, Field(gt=0)] | None


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
    p50_ms: Percentile
    """None of a percentile: so many requests were lost, or the run was too short."""
    p50_ms_95: tuple[float, float] | None = None
    p99_ms: Percentile
    p99_ms_95: tuple[float, float] | None = None
    p999_ms: Percentile = None
    p999_ms_95: tuple[float, float] | None = None
    tail_ms: tuple[float | None, ...] = ()
    """The largest latencies, from the largest, None for a request without an answer."""
    errors: Annotated[int, Field(ge=0)] | None = None
    """Requests without an answer; None: those of `tail_ms`."""
    key: str | None = None
    """Of the newest row of several with one key alone it is true that the run was measured so."""
    settings: Any = None
    """What else the run depends on; runs of one arm have the same."""

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return self.tail_ms.count(None) if self.errors is None else self.errors

    def percentile(self, name: str) -> Estimate | None:
        """Return a percentile (of QUANTILES) in ms; None if the row does not tell.

        It is infinite if more requests were lost than may lie beyond it.
        """
        value: float | None = getattr(self, f"{name}_ms")
        if value is not None:
            return Estimate(value, getattr(self, f"{name}_ms_95"))
        beyond = self.requests - 1 - rank_of(self.requests, QUANTILES[name])
        return Estimate(math.inf, None) if self.lost > beyond else None


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
    def requests(self) -> int:
        """Of all runs."""
        return sum(run.requests for run in self.runs)

    @property
    def lost(self) -> int:
        """Requests without an answer, of all runs."""
        return sum(run.lost for run in self.runs)

    def percentile(self, name: str) -> Estimate | None:
        """Return a percentile (of QUANTILES) in ms of all runs; None if a run has none.

        It is infinite if too many requests were lost.
        """
        runs = self._own(name)
        return None if runs is None else percentile_of_runs(runs, QUANTILES[name])

    def simulated(self, name: str, latencies: Sequence[np.ndarray]) -> float:
        """Return the same percentile of simulations, in ms, taken in the same way.

        It is that of all requests together where the measured one is, else the geometric mean of
        the runs' own: the two differ where runs do.

        Args:
            name: of a percentile that the arm has.
            latencies: in ms, (n,) of the requests of each run's simulation.
        """
        share = QUANTILES[name]
        measured = self._own(name)
        together = measured is not None and pooled(measured, share) is not None
        runs = [
            RunPercentile(
                Estimate(percentile(own, share), None), own if together else own[:0], len(own)
            )
            for own in latencies
        ]
        return percentile_of_runs(runs, share).value

    def _own(self, name: str) -> list[RunPercentile] | None:
        """Return the runs' own percentiles; None if one has none."""
        found = [
            RunPercentile(own, latencies_of(run.tail_ms), run.requests)
            for run in self.runs
            if (own := run.percentile(name)) is not None
        ]
        return found if len(found) == len(self.runs) else None


SETTINGS = ("name", "policy", "workers", "k", "r", "method", "backup", "routing", "stragglers")
RULES = ("deadline_ms", "group_timeout_ms", "hang_timeout_ms")
LOAD = ("qps", "batch", "requests")
TIMES = ("service", "encode", "trip", "front_end", "decode")


class MeasuredFile(NamedTuple):
    """What a file held when it was read: more may be measured since."""

    runs: list[MeasuredRun]
    digest: str


def read_runs(path: Path) -> MeasuredFile:
    """Read measured runs: JSONL rows of kind `latency`; others are passed over.

    Of the rows of `bench latency` those are taken that its tables show. A last line that is not
    whole is one that is being written, or was when that was interrupted: it does not count.

    Raises:
        UserError: if the file cannot be read, or holds no runs, or a wrong one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read the measured runs {path}: {reason}") from error
    whole, _, last = content.rpartition(b"\n")
    try:
        text = (content if is_whole(last) else whole).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the measured runs {path}: {error}") from error
    lines = text.split("\n")  # at nothing else: a row's words may hold other ends of lines
    places = [(f"{path}, line {i}", line) for i, line in enumerate(lines, start=1)]
    rows = [(where, parse_json(line, where)) for where, line in places if line.strip()]
    benched = [
        {**row, "where": where}
        for where, row in rows
        if isinstance(row, dict) and row.get("kind") == "latency" and is_latency_row(row)
    ]
    older = {row["where"] for row in benched} - {row["where"] for row in current_latency(benched)}
    runs: list[MeasuredRun] = []
    for where, row in rows:
        if isinstance(row, dict) and (row.get("kind") != "latency" or row.get("error")):
            continue
        if where in older:
            continue
        runs.append(validated(MeasuredRun, row, where))
    if not runs:
        raise UserError(f"{path} holds no row of kind 'latency'")
    return MeasuredFile(runs, content_digest(content))


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


def with_times_of_others(arms: Sequence[MeasuredArm]) -> list[MeasuredArm]:
    """Return arms with the times of other runs than their own, where there are any.

    A simulation with a run's own times would meet it if the rules were wrong and the times made up
    for that. The means of others' quantiles are taken: of other arms in the same setting, else of
    all others.
    """
    found = []
    for arm in arms:
        others = [run for other in arms if other is not arm for run in other.runs]
        setting = [run for run in others if _setting(run) == _setting(arm.runs[0])]
        times = {}
        for name in TIMES:
            told = [run for run in setting if getattr(run, name) is not None] or others
            kept = [time for run in told if (time := getattr(run, name)) is not None]
            if kept:
                times[name] = _mean_of(kept)
        found.append(MeasuredArm(tuple(run.model_copy(update=times) for run in arm.runs)))
    return found


def _setting(run: MeasuredRun) -> tuple[Any, ...]:
    return run.workers, run.qps, run.batch, run.stragglers


def _mean_of(times: Sequence[Distribution]) -> Distribution:
    """Return the mean of quantiles; the first distribution if they are of other shares."""
    first = times[0]
    if not first.shares or any(other.shares != first.shares for other in times):
        return first
    values = np.mean([np.sort(other.values_ms) for other in times], axis=0)
    return first.model_copy(update={"values_ms": tuple(values.round(4).tolist())})


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


def compare(arm: MeasuredArm, latencies: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return for each percentile what was measured and simulated, and whether they agree.

    They agree within 15 % of the measured value or within its 95 % interval, whichever is wider; a
    value that is infinite (None in the result), since too many requests were lost, agrees with
    another alone. Where there is no interval and fewer than ten requests are beyond the percentile
    (or, if it is infinite, were lost), nothing is known of the measured value but that it came out
    once: `agrees` is None then. A percentile that was not measured is left out.

    Args:
        arm: what was measured.
        latencies: in ms, (n,) of the requests of each run's simulation.
    """
    found = {}
    for name in COMPARED:
        measured = arm.percentile(name)
        if measured is None:
            continue
        value, interval = measured
        low, high = interval or (value, value)
        low, high = min(low, (1 - TOLERANCE) * value), max(high, (1 + TOLERANCE) * value)
        late = arm.simulated(name, latencies)
        few = sections_for(arm.requests, QUANTILES[name]) < 1
        if math.isinf(value):
            few = arm.lost < TAIL
        found[name] = {
            "measured_ms": rounded(value, 3),
            "simulated_ms": rounded(late, 3),
            "allowed_ms": [rounded(low, 3), rounded(high, 3)],
            "agrees": None if interval is None and few else low <= late <= high,
        }
    return found


class Tally(NamedTuple):
    """How many percentiles of all arms agree, and of those that are not judged, why.

    Attributes:
        percentiles: of all arms, COMPARED of each.
        compared: those that are judged.
        agree: of these.
        near: of these, within TOLERANCE, whatever the interval.
        never: of these, infinite on both sides.
        too_few_requests: not judged, since the run was too short to tell.
        not_measured: not judged, since the rows have none.
    """

    percentiles: int
    compared: int
    agree: int
    near: int
    never: int
    too_few_requests: int
    not_measured: int


def is_near(cell: Mapping[str, Any]) -> bool:
    """Tell whether a percentile is within TOLERANCE of the measured one, and both are finite."""
    pair = cell["measured_ms"], cell["simulated_ms"]
    return None not in pair and abs(pair[1] / pair[0] - 1) <= TOLERANCE


def tally(arms: Sequence[Mapping[str, Any]]) -> Tally:
    """Count how arms compare, each with the `percentiles` that `compare` returned."""
    cells = [cell for arm in arms for cell in arm["percentiles"].values()]
    good = [cell for cell in cells if cell["agrees"]]
    never = sum(cell["measured_ms"] is None for cell in good)
    near = sum(map(is_near, good))
    few = sum(cell["agrees"] is None for cell in cells)
    whole = len(COMPARED) * len(arms)
    return Tally(whole, len(cells) - few, len(good), near, never, few, whole - len(cells))


def table(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of comparisons, and how many percentiles agree."""
    width = max(len(row["name"]) for row in comparisons)
    head = "  ".join(f"{name:>10} {'simulated':>10}   " for name in COMPARED)
    lines = [f"{'arm':<{width}}  runs  {head}"]
    marks = {True: "ok", False: "no", None: "? "}
    for row in comparisons:
        cells = []
        for name in COMPARED:
            cell = row["percentiles"].get(name)
            if cell is None:
                cells.append(f"{'-':>10} {'-':>10}   ")
                continue
            pair = [shown(cell[side]) for side in ("measured_ms", "simulated_ms")]
            cells.append(f"{pair[0]:>10} {pair[1]:>10} {marks[cell['agrees']]}")
        lines.append(f"{row['name']:<{width}}  {row['runs']:>4}  {'  '.join(cells)}".rstrip())
    found, together = tally(comparisons), check(comparisons)
    lines.append("nothing to compare" if together is None else told(together))
    lines.append(
        f"{found.compared - found.agree} of {found.compared} beyond both {TOLERANCE:.0%} and the "
        "measured 95 % interval (no)"
    )
    if found.too_few_requests:
        lines.append(f"{found.too_few_requests} not judged (?): {TOO_FEW}")
    if found.not_measured:
        lines.append(f"{found.not_measured} not judged (-): {NOT_MEASURED}")
    return lines


def shown(latency: float | None) -> str:
    """Return a latency in ms as tables have it; None stands for one without end."""
    return "never" if latency is None else f"{latency:.1f}"
