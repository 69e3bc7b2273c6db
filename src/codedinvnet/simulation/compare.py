"""`codedinvnet plan`: compare policies on numbers of machines, by simulation of a measured load.

A latency log is fitted to a scenario, or a scenario is read. All policies meet the same arrivals
and the same draws, so that they differ by what they do and not by luck.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.codes.named_policies import served_as
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_writable, read_json, write_json
from codedinvnet.common.progress import Progress
from codedinvnet.common.provenance import describe_commit, describe_machine
from codedinvnet.common.quantiles import percentile, rank_of
from codedinvnet.models.bundle import bundle_info
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import QUANTILES, aligned, no_interval, summarise
from codedinvnet.simulation.recording import Fitted, fit, read_log
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from codedinvnet.simulation.warnings import few_hit, rarest, too_short

POLICIES = ("uncoded", "replicate", "hedge", "small-backup", "small-backup+hedge", "auto")
WITH_BUNDLE = ("coded", "coded+hedge")
"""Policies that are compared as well if there is a bundle, whose code they have."""
LOADS = (0.8, 0.6, 0.4, 0.3, 0.2)
"""Shares of their time that machines are busy, for the numbers of them that are compared unless the
user names some."""
REQUESTS = 53_000
"""Of a run: enough for an interval of p99.9."""
BESIDES = {"trip": 0.0, "front_end": 1.7, "decode": 0.6}
"""Milliseconds of the scenario of a log, whose times include the way to a worker."""
MOST = 16
"""Times the machines that the load itself needs: no more are tried to meet a target."""
FRONT_END_BUSY = 0.7
"""Share of its time from which a front end, which is one process, has a queue of its own."""
MS = {"p50": "p50 ms", "p99": "p99 ms", "p999": "p99.9 ms"}
"""Percentiles of the table, and the titles of their columns."""


def compare(
    base: Scenario, policies: Iterable[str], workers: Iterable[int]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Simulate every policy on every number of machines.

    Args:
        base: load, times and stragglers.
        policies: names as `served_as` takes them.
        workers: numbers of machines.

    Returns:
        A row for each pair with `policy`, `workers` and the figures of `simulate`, and why policies
        were left out.
    """
    rows, left = [], {}
    pairs = [(policy, count) for policy in policies for count in sorted(set(workers))]
    for policy, count in Progress(pairs, desc="compare", unit="run", leave=False):
        try:
            rows.append({"policy": policy, "workers": count, **_simulated(base, policy, count)})
        except UserError as error:
            left[f"{policy} on {count}"] = str(error)
    return rows, left


def fewest(base: Scenario, policy: str, target_ms: float) -> dict[str, Any]:
    """Find the fewest machines on which a policy keeps p99.9 within a target.

    The search doubles, then bisects. The number is judged by a run with draws that had no part in
    the search, since the run that chose it would flatter; if that run misses, one more is taken.

    Returns:
        A row as of `compare`; `workers` is None if the most that were `tried` miss the target.

    Raises:
        UserError: if the policy cannot be simulated.
    """
    served = served_as(policy).scenario
    good = max(math.floor(base.busy_workers) + 1, _named(base))
    most = max(MOST * good, 64)
    while good < most:  # a code needs a worker for each of its tasks
        try:
            base.updated(**served, workers=good)
            break
        except UserError:
            good += 1
    bad = good - 1

    def meets(workers: int, seed: int) -> dict[str, Any]:
        """Return the figures of a run; {} if it misses the target."""
        figures = _simulated(base, policy, workers, seed, target_ms)
        late = figures["p999_ms"]
        good = late is not None and late <= target_ms and not figures["drifting"]
        return figures if good else {}

    while good < most and not meets(good, base.seed):
        bad, good = good, min(2 * good, most)
    while good - bad > 1:
        middle = (good + bad) // 2
        bad, good = (bad, middle) if meets(middle, base.seed) else (middle, good)
    while not (found := meets(good, base.seed + 1)) and good < most:
        good += 1
    figures = found or _simulated(base, policy, good)
    return {"policy": policy, "workers": good if found else None, "tried": good, **figures}


def _simulated(
    base: Scenario, policy: str, workers: int, seed: int | None = None, stop_ms: float | None = None
) -> dict[str, Any]:
    """Return a policy's figures; a run whose p99.9 cannot be within `stop_ms` ends early."""
    seed = base.seed if seed is None else seed
    scenario = base.updated(**served_as(policy).scenario, workers=workers, seed=seed)
    limit = None
    if stop_ms is not None:
        beyond = scenario.counted - 1 - rank_of(scenario.counted, QUANTILES["p999"])
        limit = stop_ms / 1000, beyond
    records = Simulation(scenario, limit=limit).run()
    figures = summarise(records, scenario)
    if not records.complete:
        figures["p999_ms"] = None
    return {"load": round(scenario.arrivals.qps / scenario.capacity_qps, 4), **figures}


def _named(base: Scenario) -> int:
    """Return the number of workers that a scenario's stragglers need."""
    return max((max((s.worker or 0) + 1, s.workers or 0) for s in base.stragglers), default=1)


def run_plan(
    source: Path,
    *,
    workers: Sequence[int] = (),
    policy: Sequence[str] = (),
    p999_ms: float | None = None,
    bundle: str | None = None,
    out: Path | None = None,
    **changes: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Compare policies on the load of a latency log or a scenario; return a report and its lines.

    Args:
        source: the log (.csv) or the scenario (.json).
        workers: numbers of machines; none: with a target the fewest that meet it, else some.
        policy: policies; none: those that need nothing but a small backup, and the bundle's.
        p999_ms: what p99.9 may be.
        bundle: whose code is compared as well.
        out: file for the scenario.
        changes: fields of the scenario; None leaves its value.

    Raises:
        UserError: if a file or a value is wrong, before anything is simulated.
    """
    asked = () if p999_ms is None else (p999_ms,)
    for option, values in (("--workers", workers), ("--p999-ms", asked)):
        if not min(values, default=1) > 0:
            raise UserError(f"{option}: must be above 0, got {min(values)}")
    if out is not None:
        if out.resolve() == source.resolve():
            raise UserError(f"--out: {out} would overwrite what is read")
        check_writable(out)
    for one in policy:
        served_as(one)
    base, fitted = read_source(source, bundle, {k: v for k, v in changes.items() if v is not None})
    if out is not None:
        write_json(out, base.model_dump(mode="json", exclude_defaults=True))
    wanted = list(dict.fromkeys(policy or (*POLICIES, *(WITH_BUNDLE if base.bundle else ()))))
    rows: list[dict[str, Any]] = []
    left: dict[str, str] = {}
    if p999_ms is not None and not workers:
        for one in Progress(wanted, desc="plan", unit="policy", leave=False):
            try:
                rows.append(fewest(base, one, p999_ms))
            except UserError as error:
                left[one] = str(error)
        rows.sort(key=lambda row: (row["workers"] or math.inf, row["work_per_query"]))
    else:
        counts = workers or {math.ceil(base.busy_workers / load) for load in LOADS}
        rows, left = compare(base, wanted, {max(count, _named(base)) for count in counts})
    if not rows:
        raise UserError(list(left.values())[-1])
    report = {
        "schema_version": 2,
        "kind": "plan",
        "scenario": base.model_dump(mode="json", exclude_defaults=True),
        "p999_ms": p999_ms,
        "rows": rows,
        "left_out": left,
        "notes": _notes(base, rows),
        "machine": describe_machine(),
        "commit": describe_commit(),
    }
    return report, [*([] if fitted is None else fit_lines(fitted)), *_lines(report)]


def read_source(
    path: Path, bundle: str | None, changes: dict[str, Any]
) -> tuple[Scenario, Fitted | None]:
    """Return the scenario of a log or a scenario file, and the fit of a log.

    Raises:
        UserError: if the file or a change is wrong.
    """
    fitted, raw = None, None
    if path.suffix.lower() == ".csv":
        if "qps" not in changes:
            raise UserError("--qps: a log does not say the load")
        fitted = fit(read_log(path))
        causes = [straggler.model_dump() for straggler in fitted.stragglers]
        raw = {"name": path.stem, "arrivals": {"qps": changes["qps"]}, **BESIDES}
        raw |= {"service": fitted.service.model_dump(), "stragglers": causes}
    elif not isinstance(raw := read_json(path), dict):
        raise UserError(f"{path}: neither a log (.csv) nor a scenario (.json)")
    # The policy, and how many machines there are, is what is compared.
    raw = {**raw, "policy": "uncoded", "method": "coded-invnet", "workers": 10_000}
    if bundle is not None:
        raw |= {"bundle": bundle}
    base = parse_scenario(raw, str(path))
    if base.bundle is not None:
        bundle_info(base.bundle)  # or is refused now
    if "queries" not in base.model_fields_set:
        changes = {"queries": REQUESTS * changes.get("batch", base.arrivals.batch), **changes}
    if (encode := changes.pop("encode_ms", None)) is not None:
        changes["encode"] = encode
    if (model := changes.pop("stragglers", None)) is not None:
        named = stragglers(model, base.service.mean_ms, changes.get("batch", base.arrivals.batch))
        changes["stragglers"] = [straggler.model_dump() for straggler in named]
    return base.updated(**changes), fitted


def _notes(base: Scenario, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the runs cannot be trusted for."""
    most = max(row["workers"] or row["tried"] for row in rows)
    notes = [
        *too_short(base.queries / base.arrivals.qps, rarest(base, most), "The runs last"),
        *few_hit(base.stragglers, most),
    ]
    busy = base.arrivals.qps / base.arrivals.batch * base.front_end.mean_ms / 1000
    if busy > FRONT_END_BUSY:
        notes.append(
            f"One front end would be {busy:.0%} busy, and its queue is not simulated: start "
            f"{math.ceil(busy / FRONT_END_BUSY)}, each with its own workers."
        )
    return notes


def fit_lines(fitted: Fitted) -> list[str]:
    """Return the lines that say what was fitted to a log, and how well."""
    tasks, count, mean = len(fitted.times), len(fitted.workers), fitted.service.mean_ms
    lines = [f"{tasks} tasks of {count} workers; {mean:.4g} ms on average without stragglers"]
    for straggler in fitted.stragglers:
        said = straggler.model_dump(mode="json", exclude_defaults=True)
        whose = "" if straggler.worker is None else f"  ({fitted.workers[straggler.worker]})"
        lines.append(f"straggler  {json.dumps(said)}{whose}")
    drawn = fitted.draw()
    rows = [
        {
            "share of tasks": f"{share:g}",
            "log ms": percentile(fitted.times, share),
            "fitted ms": percentile(drawn, share),
        }
        for share in (0.5, 0.9, 0.99, 0.995, 0.999)
    ]
    if np.median(fitted.times) < 0.1:
        lines.append("half of the tasks took less than 0.1 ms: are these times in seconds?")
    return [*lines, "", *aligned(rows, {"log ms": ".4g", "fitted ms": ".4g"}), ""]


def _lines(report: Mapping[str, Any]) -> list[str]:
    table = []
    for row in report["rows"]:
        low, high = row["p999_ms_95"] or (None, None)
        table.append(
            {
                "policy": row["policy"],
                "machines": row["workers"],
                "load": row["load"],
                **{title: row[f"{name}_ms"] for name, title in MS.items()},
                "from": low,
                "to": high,
                "work": row["work_per_query"],
                "approximate": row["decoded_share"],
                "": _remark(row, report["p999_ms"]),
            }
        )
    formats = {**dict.fromkeys((*MS.values(), "from", "to"), ".1f"), "work": ".2f"}
    formats |= {"machines": ".0f", "load": ".0%", "approximate": ".2%"}
    left = [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    notes = report["notes"]
    return [*notes, *([""] if notes else []), *aligned(table, formats), *left]


def _remark(row: Mapping[str, Any], target: float | None) -> str:
    """Return what stands behind a row of the table."""
    if target is not None and row["workers"] is None:
        return f"misses {target:g} ms with {row['tried']}, the most tried"
    if row["drifting"]:
        return "requests wait ever longer"
    if target is None or row["p999_ms"] is None:
        return ""
    if row["p999_ms"] > target:
        return "misses the target"
    if row["p999_ms_95"] is None:
        return f"unsure: {no_interval(row['requests'], QUANTILES['p999'])}"
    beyond = row["p999_ms_95"][1] > target
    return "unsure: the interval reaches beyond the target" if beyond else ""
