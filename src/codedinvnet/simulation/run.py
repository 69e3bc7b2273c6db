"""`codedinvnet simulate` and `codedinvnet plan`: from what was asked for to a report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.codes.registry import OURS
from codedinvnet.errors import UserError
from codedinvnet.evaluation.cost import info_report
from codedinvnet.files import check_writable, file_digest, read_json, write_json
from codedinvnet.models.bundle import load_bundle
from codedinvnet.progress import Progress
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.scheduler.settings import coded_too_late
from codedinvnet.serving.policies import SERVED, check_extra, served_as
from codedinvnet.simulation import measured as runs_of
from codedinvnet.simulation import plan
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.doubts import few_hit, overload, rarest, too_short
from codedinvnet.simulation.engine import accuracy_of
from codedinvnet.simulation.figures import figure_lines, simulate, simulate_requests
from codedinvnet.simulation.picture import check_format, draw_map
from codedinvnet.simulation.plan import calibrated
from codedinvnet.simulation.scenario import (
    Accuracy,
    Scenario,
    bundle_accuracy,
    can_guess,
    check_code,
    load_scenario,
    parse_scenario,
)
from codedinvnet.simulation.stragglers import stragglers
from codedinvnet.simulation.sweep import (
    Sweep,
    doubts_of,
    frame_of,
    lines_of,
    parse_sweep,
    quick_sweep,
    run_sweep,
    winners,
)

REPEATED = ("queries", "seed")
"""What may be asked for of measured runs, too."""


def _check_policies(asked: Iterable[str]) -> None:
    """Refuse what nobody serves.

    Raises:
        UserError: naming the option.
    """
    for policy in asked:
        try:
            served_as(policy)
        except UserError as error:
            raise UserError(f"--policy: {error}") from error


def run_simulate(
    scenario: Path,
    *,
    measured: Path | None = None,
    out: Path | None = None,
    picture: Path | None = None,
    quick: bool = False,
    **changes: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Simulate a scenario, repeat measured runs, or run a sweep; return a report and its lines.

    Args:
        scenario: the file, also of a sweep.
        measured: runs to repeat.
        out: file of a sweep's rows, or of the comparison with measured runs.
        picture: of a sweep.
        quick: simulate few queries in each place of a sweep.
        changes: of the scenario; None leaves its value.

    Raises:
        UserError: if a file or a value is wrong, before anything is simulated.
    """
    asked = {key: value for key, value in changes.items() if value is not None}
    raw = read_json(scenario)  # once: it may be a pipe
    if (sweep := parse_sweep(raw, scenario)) is not None:
        if asked or measured:
            raise UserError(f"{scenario} is a sweep: its file alone says what is simulated")
        if out is None:
            raise UserError(f"{scenario} is a sweep: name the file of its rows with --out")
        return _sweep(quick_sweep(sweep) if quick else sweep, out, picture)
    for option, given in (("--picture", picture is not None), ("--quick", quick)):
        if given:
            raise UserError(f"{option} belongs to a sweep (see configs/bench)")
    if out is not None and measured is None:
        raise UserError("--out belongs to a sweep (see configs/bench), or to --measured")
    useless = [key for key in asked if key not in REPEATED]
    if measured is not None and useless:
        option = useless[0].replace("_", "-")
        raise UserError(f"--{option}: {measured} says itself what its runs were")
    if out is not None:
        check_writable(out)
        if out.resolve() in [read.resolve() for read in (scenario, measured) if read is not None]:
            raise UserError(f"--out: {out} would overwrite what is read")
    base = parse_scenario(raw, str(scenario))
    base = base.updated(**_changes(asked, base))
    check_code(base)
    provenance = {"machine": describe_machine(), "commit": describe_commit()}
    if measured is not None:
        report, lines = _validate(base, measured)
        if out is not None:
            write_json(out, report | provenance)
        return report | provenance, lines
    figures = simulate(base, progress=True)
    notes = [
        *overload(base, figures["drifting"]),
        *too_short(figures["simulated_seconds"], rarest(base, base.workers)),
    ]
    found = {**figures, "notes": notes, **provenance}
    return found, figure_lines(found, base)


def _sweep(sweep: Sweep, out: Path, picture: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Run a sweep, and draw its map if there is to be a picture."""
    if picture is not None:
        check_format(picture)
        check_writable(picture)
    rows = run_sweep(sweep, out)
    frame, notes = frame_of(rows), doubts_of(rows)
    if picture is not None:
        draw_map(frame, picture)
    wins = winners(frame).to_dict("records")
    report = {"schema_version": 1, "kind": "map", "rows": len(frame), "wins": wins, "notes": notes}
    return report, [*lines_of(frame), *([""] if notes else []), *notes]


def _changes(asked: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """Return what options that were asked for change in a scenario."""
    changes, batch = dict(asked), asked.get("batch", scenario.arrivals.batch)
    if batch < 1:
        raise UserError(f"--batch: must be at least 1, got {batch}")
    check_extra(asked.get("extra"))
    if "policy" in asked:
        _check_policies((asked["policy"],))
        changes |= served_as(asked["policy"]).scenario
    if "stragglers" in asked:
        model = stragglers(asked["stragglers"], scenario.service.mean_ms, batch)
        changes["stragglers"] = [straggler.model_dump() for straggler in model]
    return changes


def _validate(base: Scenario, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Simulate the settings of measured runs and compare, arm by arm.

    The scenario of each run is what the base, its row, and the times of other runs make of it.
    """
    arms, digest = runs_of.arms_of(runs_of.read_runs(path)), file_digest(path)
    lent = runs_of.with_others_times(arms)
    scenarios = [runs_of.scenarios_of(arm, base) for arm in lent]
    accuracy = accuracy_of(base)
    for scenario in (one for repeated in scenarios for own in repeated for one in own):
        scenario.check_accuracy(accuracy)
    rows: list[dict[str, Any]] = []
    for arm, repeated in zip(arms, scenarios, strict=True):
        latencies = [
            np.concatenate([simulate_requests(one, accuracy, progress=True)[0] for one in own])
            for own in repeated
        ]
        rows.append(
            {
                "name": arm.name,
                "place": runs_of.place_of(arm),
                "runs": len(arm.runs),
                "percentiles": runs_of.compare(arm, latencies),
                "same_arrivals": arm.seeded,
                "simulated_requests": sum(map(len, latencies)),
            }
        )
    alone = sum(map(len, (arm.runs for arm in arms))) == 1
    report = {
        "schema_version": runs_of.SCHEMA,
        "kind": "validation",
        "measured": str(path),
        "measured_digest": digest,
        "base": base.model_dump(mode="json", exclude_defaults=True),
        "percentiles": runs_of.tally(rows),
        "own_times": alone,
        "arms": rows,
    }
    note = ["There is one run alone, so its own times were taken: that is no check.", ""]
    return report, [*(note if alone else []), *runs_of.table(rows)]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What `codedinvnet plan` was asked for; the command line explains the fields."""

    bundle: str
    qps: float
    p999_ms: float
    min_accuracy: float
    scenario: Path | None = None
    accuracy_rows: Path | None = None
    service_ms: float | None = None
    encode_ms: float | None = None
    stragglers: str | None = None
    batch: int | None = None
    extra: float | None = None
    policy: tuple[str, ...] = ()
    k: tuple[int, ...] = ()
    queries: int | None = None
    seed: int | None = None
    deadline_ms: float | None = None
    hang_timeout_ms: float | None = None
    max_disagreement: float | None = None


PLANNED = ("queries", "seed", "extra", "deadline_ms", "hang_timeout_ms", "max_disagreement")
"""What changes the scenario by its own name."""
DEFAULT_REQUESTS = 53_000
"""Of a plan's longest runs: enough for an interval of p99.9."""
DEFAULT_STRAGGLERS = "pareto"
SERVICE = Distribution(distribution="lognormal", ms=24.0, shape=0.1)
"""As in the shipped scenarios; its mean is given or measured."""
BESIDES = {"trip": 0.3, "front_end": 1.7, "decode": 0.6}
"""Milliseconds, as in the shipped scenarios, of the service on the machine that made them."""
BUSY = 0.7
"""Share of its time from which a front end, one process, has queues of its own."""


def run_plan(options: PlanOptions) -> tuple[dict[str, Any], list[str]]:
    """Rank the ways to serve by the workers that they need; return a report and its lines.

    Raises:
        UserError: if a value is wrong, before anything is simulated.
    """
    target = plan.Target(options.p999_ms, options.min_accuracy)
    plan.check_target(target)
    _check_policies(options.policy)
    base = _plan_base(options)
    _check_patience(base, target, options.policy)
    notes = []
    if base.bundle not in (None, options.bundle):
        notes.append(
            f"{options.scenario} is of the bundle {base.bundle}: its times are taken for those of "
            f"{options.bundle}, whose code is planned, but not its accuracy."
        )
        rated = {} if options.accuracy_rows is None else base.method_accuracy
        base = base.updated(accuracy=None, method_accuracy=rated)
    base = base.updated(bundle=options.bundle)
    accuracy = base.accuracy or bundle_accuracy(options.bundle)
    if (needed := plan.fewest_workers(base)) > (most := base.workers):
        raise UserError(f"--qps: this load needs {needed:,} workers; {most:,} are the most tried")
    wanted, left = _candidates(options, base, accuracy)
    why = [
        f"not ranked: {', '.join(p for p in left if left[p] == reason)}, since {reason}"
        for reason in dict.fromkeys(left.values())
    ]
    if not wanted:
        raise UserError("; ".join(why))
    began = time.process_time()
    with Progress(total=plan.runs_expected(len(wanted)), desc="plan", dynamic_ncols=True) as bar:

        def step(words: str) -> None:
            bar.total = max(bar.total, bar.n + 1)
            bar.set_postfix_str(words, refresh=False)
            bar.update()

        verdicts = plan.Planner(base, accuracy, target, step).rank(wanted)
        bar.total = bar.n
    longest = base.queries / base.arrivals.qps
    fewest = plan.fewest_workers(base)
    # Of more workers one that straggles gets fewer tasks.
    rare = rarest(base, max((v.workers for v in verdicts if v.workers), default=fewest))
    notes += too_short(longest, rare, "The longest runs last")
    notes += few_hit(base.stragglers, verdicts[0].workers or 0)
    busy = base.arrivals.qps / base.arrivals.batch * base.front_end.mean_ms / 1000
    needed = max(1, math.ceil(busy / BUSY))
    if busy > BUSY:
        notes.insert(
            0,
            f"One front end would be {busy:.0%} busy, and queues there are not simulated: take "
            f"{needed}, each with workers of its own, and plan for the load of one.",
        )
    found = {
        **plan.report(verdicts, base, target),
        "front_ends": {"busy": round(busy, 4), "needed": needed},
        "not_ranked": left,
        "notes": notes,
        "bundle": options.bundle,
        "cpu_seconds": round(time.process_time() - began, 1),
        "machine": describe_machine(),
        "commit": describe_commit(),
    }
    lines = [
        f"{base.arrivals.qps:g} images a second, service {base.service.mean_ms:.2f} ms "
        f"(encoding + {base.encode.mean_ms:.2f} ms for each of a group), "
        f"trip {base.trip.mean_ms:g} ms, front end {base.front_end.mean_ms:g} ms, "
        f"p99.9 within {target.p999_ms:g} ms, accuracy of at least {target.accuracy:g}:",
        *notes,
        "",
        *plan.table(found),
        *(["", *why] if left else []),
    ]
    return found, lines


def _check_patience(base: Scenario, target: plan.Target, policies: Sequence[str]) -> None:
    """Refuse what the service would give up in the ordinary course of things.

    Raises:
        UserError: naming the option that mends it.
    """
    if target.p999_ms > base.deadline_ms:
        raise UserError(
            f"--p999-ms: {target.p999_ms:g} is beyond the deadline of {base.deadline_ms:g} ms, at "
            "which queries are given up: raise --deadline-ms"
        )
    coded = any(served_as(policy).rules.takes_code for policy in policies or SERVED)
    if coded and (why := coded_too_late(base.group_timeout_ms, base.deadline_ms)):
        raise UserError(f"--deadline-ms: group_timeout_ms (of a --scenario) {why}")
    if base.service.mean_ms >= base.hang_ms:
        raise UserError(
            f"a task takes {base.service.mean_ms:g} ms in the mean, and a worker that is at one "
            f"for {base.hang_ms:g} is replaced: raise --hang-timeout-ms"
        )


UNKNOWN = (
    "it is not known how often what is made up is right (a scenario's accuracy.recovered, "
    "accuracy.guessed, of another method its method_accuracy or --accuracy-rows)"
)


def _candidates(
    options: PlanOptions, base: Scenario, accuracy: Accuracy
) -> tuple[list[plan.Candidate], dict[str, str]]:
    """Return the ways to serve that were asked for and whose accuracy is known, and why not others.

    What was asked for are policies, and sizes k of those that have any.
    """
    policies, left = list(dict.fromkeys(options.policy or SERVED)), {}
    if not can_guess(options.bundle):
        cannot = f"the code of {options.bundle} cannot guess, or does so under coded, too"
        left = {policy: cannot for policy in policies if served_as(policy).rules.guessing}
    policies = [policy for policy in policies if policy not in left]
    known = max((k for sizes in accuracy.recovered.values() for k in sizes), default=0)
    up_to = f"; of codes it is up to k = {known}" if known else ""
    found = plan.candidates(accuracy, base.method_accuracy, policies, options.k, base.extra)
    for policy in policies:
        own = [candidate for candidate in found if candidate.policy == policy]
        lacking = sorted(set(options.k) - {candidate.k for candidate in own})
        if not plan.candidates(accuracy, base.method_accuracy, [policy]):
            left[policy] = UNKNOWN
        elif lacking and (not own or own[0].sized):
            sizes = ", ".join(map(str, lacking))
            name = f"{policy} of k = {sizes}" if own else policy
            left[name] = f"no accuracy is known of k = {sizes}{up_to}"
    found, others = calibrated(base, found)
    return found, left | others


def _plan_base(options: PlanOptions) -> Scenario:
    """Return load, times and stragglers: the options', else the scenario's, else what is usual.

    What the code can do is the bundle's, whatever the scenario says. What encoding takes, and the
    service without a scenario, is measured here if nobody says it.

    Raises:
        UserError: if an option or the scenario is wrong, or there is no such bundle.
    """
    for key in ("batch", "queries"):
        if (value := getattr(options, key)) is not None and value < 1:
            raise UserError(f"--{key}: must be at least 1, got {value}")
    for key in ("service_ms", "encode_ms", "deadline_ms", "hang_timeout_ms"):
        value = getattr(options, key)
        if value is not None and not (0 < value < math.inf or (value == 0 and key == "encode_ms")):
            raise UserError(f"--{key.replace('_', '-')}: must be above 0, got {value}")
    check_extra(options.extra)
    if any(k < 1 for k in options.k):
        raise UserError(f"--k: must be at least 1, got {min(options.k)}")
    if options.scenario is not None:
        base = load_scenario(options.scenario)
        said = base.model_fields_set
    else:
        raw = {"arrivals": {"qps": options.qps}, "service": SERVICE, "workers": 1}
        base, said = parse_scenario({**raw, "name": "plan", "policy": "uncoded"}, "plan"), set()
    service, encode = options.service_ms, options.encode_ms
    if (service is None and not said) or (encode is None and "encode" not in said):
        here = measured_times(options.bundle)
        service = here[0] if service is None and not said else service
        encode = here[1] if encode is None and "encode" not in said else encode
    batch = options.batch or base.arrivals.batch
    changes: dict[str, Any] = {"qps": options.qps, "batch": batch, "policy": "uncoded"}
    # How many may wait grows with the workers.
    most = max(plan.LARGEST, base.workers)  # a straggler may be any of them
    changes |= {"workers": most, "method": OURS, "max_pending": None}
    changes |= {key: ms for key, ms in BESIDES.items() if key not in said}
    if "queries" not in said:
        changes["queries"] = DEFAULT_REQUESTS * batch
    if options.accuracy_rows is not None:
        rows = plan.accuracy_of_methods(options.accuracy_rows, options.bundle)
        changes["method_accuracy"] = rows
    for key, mean in (("service", service), ("encode", encode)):
        if mean is not None:
            changes[key] = getattr(base, key).scaled(mean).model_dump()
    changes |= {key: value for key in PLANNED if (value := getattr(options, key)) is not None}
    base = base.updated(**changes)
    name = options.stragglers or (None if options.scenario else DEFAULT_STRAGGLERS)
    if name is not None:
        model = stragglers(name, base.service.mean_ms, base.arrivals.batch)
        base = base.updated(stragglers=[straggler.model_dump() for straggler in model])
    return base


def measured_times(name: str) -> tuple[float, float]:
    """Return what it takes here to embed an image, and to encode each of a group, in ms."""
    bundle = load_bundle(name)
    largest = max(bundle.info.group_sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    try:
        report = info_report(bundle, (largest,))
    finally:
        torch.set_num_threads(threads)
    return report["embedding_ms"], report[f"encoder_ms_k{largest}"] / largest
