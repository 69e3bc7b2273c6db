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
from codedinvnet.files import check_writable, read_json, write_json
from codedinvnet.models.bundle import load_bundle
from codedinvnet.progress import Progress
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.serving.policies import SERVED, check_extra, served_as
from codedinvnet.simulation import measured, plan
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.doubts import few_hit, overload, rarest, too_short
from codedinvnet.simulation.engine import accuracy_of
from codedinvnet.simulation.figures import figure_lines, simulate, simulate_requests
from codedinvnet.simulation.picture import check_format, draw_map
from codedinvnet.simulation.releasing import calibrated
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
from codedinvnet.simulation.sweep import frame_of, lines_of, parse_sweep, run_sweep, winners


@dataclasses.dataclass(frozen=True)
class SimulateOptions:
    """What `codedinvnet simulate` was asked for; None leaves the scenario's value."""

    scenario: Path
    policy: str | None = None
    workers: int | None = None
    k: int | None = None
    r: int | None = None
    qps: float | None = None
    batch: int | None = None
    extra: float | None = None
    queries: int | None = None
    seed: int | None = None
    stragglers: str | None = None
    max_disagreement: float | None = None
    measured: Path | None = None
    out: Path | None = None
    picture: Path | None = None


CHANGES = (
    *("policy", "workers", "k", "r", "qps", "batch", "queries", "seed", "stragglers"),
    *("extra", "max_disagreement"),
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


def run_simulate(options: SimulateOptions) -> tuple[dict[str, Any], list[str]]:
    """Simulate a scenario, repeat measured runs, or run a sweep; return a report and its lines.

    Raises:
        UserError: if a file or a value is wrong, before anything is simulated.
    """
    provenance = {"machine": describe_machine(), "commit": describe_commit()}
    asked = [key for key in CHANGES if getattr(options, key) is not None]
    raw = read_json(options.scenario)  # once: it may be a pipe
    sweep = parse_sweep(raw, options.scenario)
    if sweep is not None:
        if asked or options.measured:
            raise UserError(f"{options.scenario} is a sweep: its file alone says what is simulated")
        if options.out is None:
            raise UserError(f"{options.scenario} is a sweep: name the file of its rows with --out")
        if options.picture is not None:
            check_format(options.picture)
            check_writable(options.picture)
        rows = run_sweep(sweep, options.out)
        frame = frame_of(rows)
        if options.picture is not None:
            draw_map(frame, options.picture)
        wins = winners(frame).to_dict("records")
        report = {"schema_version": 1, "kind": "map", "rows": len(rows), "wins": wins}
        return report, lines_of(frame)
    if options.picture is not None:
        raise UserError("--picture belongs to a sweep (see configs/bench)")
    if options.out is not None and options.measured is None:
        raise UserError("--out belongs to a sweep (see configs/bench), or to --measured")
    useless = [key for key in asked if key not in REPEATED]
    if options.measured is not None and useless:
        raise UserError(f"--{useless[0]}: {options.measured} says itself what its runs were")
    if options.out is not None:
        check_writable(options.out)
        for read in (options.scenario, options.measured):
            if read is not None and read.resolve() == options.out.resolve():
                raise UserError(f"--out: {options.out} would overwrite what is read")
    scenario = parse_scenario(raw, str(options.scenario))
    scenario = scenario.updated(**_changes(options, asked, scenario))
    check_code(scenario)
    if options.measured is not None:
        report, lines = _validate(scenario, options.measured, provenance)
        if options.out is not None:
            write_json(options.out, report)
        return report, lines
    figures = simulate(scenario, progress=True)
    notes = [
        *overload(scenario, figures["drifting"]),
        *too_short(figures["simulated_seconds"], rarest(scenario, scenario.workers)),
    ]
    found = {**figures, "notes": notes, **provenance}
    return found, figure_lines(found, scenario)


def _changes(options: SimulateOptions, asked: Sequence[str], scenario: Scenario) -> dict[str, Any]:
    """Return what options that were asked for change in a scenario."""
    changes = {key: getattr(options, key) for key in asked}
    if options.batch is not None and options.batch < 1:
        raise UserError(f"--batch: must be at least 1, got {options.batch}")
    check_extra(options.extra)
    if options.policy is not None:
        _check_policies((options.policy,))
        changes |= served_as(options.policy).scenario
    if options.stragglers is not None:
        batch = options.batch or scenario.arrivals.batch
        model = stragglers(options.stragglers, scenario.service.mean_ms, batch)
        changes["stragglers"] = [straggler.model_dump() for straggler in model]
    return changes


def _validate(
    base: Scenario, path: Path, provenance: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Simulate the settings of measured runs and compare, arm by arm.

    The scenario of each run is what the base and its row make of it, and is not repeated.
    """
    found = measured.read_runs(path)
    arms = measured.arms_of(found.runs)
    scenarios = [measured.scenarios_of(arm, base) for arm in arms]
    accuracy = accuracy_of(base)
    for scenario in (one for repeated in scenarios for own in repeated for one in own):
        scenario.check_accuracy(accuracy)
    rows: list[dict[str, Any]] = []
    for arm, repeated in zip(arms, scenarios, strict=True):
        runs = [
            [simulate_requests(scenario, accuracy, progress=True) for scenario in own]
            for own in repeated
        ]
        latencies = [np.concatenate([one for one, _ in own]) for own in runs]
        figures = [
            [{k: v for k, v in one.items() if k != "scenario"} for _, one in own] for own in runs
        ]
        rows.append(
            {
                "name": arm.name,
                "place": measured.place_of(arm),
                "runs": len(arm.runs),
                "percentiles": measured.compare(arm, latencies),
                "same_arrivals": arm.seeded,
                "simulated": figures,
            }
        )
    report = {
        "schema_version": measured.SCHEMA,
        "kind": "validation",
        "measured": str(path),
        "measured_digest": found.digest,
        "base": base.model_dump(mode="json", exclude_defaults=True),
        "percentiles": measured.tally(rows),
        "arms": rows,
        **provenance,
    }
    return report, measured.table(rows)


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
    _check_patience(base, target)
    notes = []
    if base.bundle not in (None, options.bundle):
        notes.append(
            f"{options.scenario} is of the bundle {base.bundle}: its times are taken for those of "
            f"{options.bundle}, whose code is planned."
        )
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
    rare = rarest(base, plan.fewest_workers(base))
    notes += too_short(longest, rare, "The longest runs last")
    notes += few_hit(base.stragglers, verdicts[0].workers or 0)
    busy = base.arrivals.qps / base.arrivals.batch * base.front_end.mean_ms / 1000
    needed = max(1, math.ceil(busy / BUSY))
    if busy > BUSY:
        notes.insert(0, _front_ends(busy, needed))
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


def _front_ends(busy: float, needed: int) -> str:
    """Say how busy one front end is, and how many it takes: that is not simulated."""
    return (
        f"One front end would be {busy:.0%} busy, and queues there are not in these figures: take "
        f"{needed}, each with workers of its own, and plan for the load of one."
    )


def _check_patience(base: Scenario, target: plan.Target) -> None:
    """Refuse what the service would give up in the ordinary course of things.

    Raises:
        UserError: naming the option that mends it.
    """
    if target.p999_ms > base.deadline_ms:
        raise UserError(
            f"--p999-ms: {target.p999_ms:g} is beyond the deadline of {base.deadline_ms:g} ms, at "
            "which queries are given up: raise --deadline-ms"
        )
    if base.group_timeout_ms >= base.deadline_ms:
        raise UserError(
            f"--deadline-ms: {base.deadline_ms:g} is not above the {base.group_timeout_ms:g} ms "
            "after which groups that do not fill are coded: raise it, or have a smaller "
            "group_timeout_ms in a --scenario, as `serve` would need --group-timeout-ms"
        )
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

    Raises:
        UserError: if a k that was asked for is none of any of them.
    """
    policies = list(dict.fromkeys(options.policy or SERVED))
    left = {}
    if not can_guess(options.bundle):
        cannot = f"the code of {options.bundle} cannot guess, or does so under coded, too"
        left = {policy: cannot for policy in policies if served_as(policy).rules.guessing}
    policies = [policy for policy in policies if policy not in left]
    found = plan.candidates(accuracy, base.method_accuracy, policies, options.k, base.extra)
    ranked = {candidate.policy for candidate in found}
    known = max((k for sizes in accuracy.recovered.values() for k in sizes), default=0)
    up_to = f"; of codes it is up to k = {known}" if known else ""
    of_k = f"no accuracy is known of k = {', '.join(map(str, sorted(set(options.k))))}{up_to}"
    for policy in policies:
        own = {candidate.k for candidate in found if candidate.policy == policy and candidate.sized}
        if policy not in ranked:
            at_any = plan.candidates(accuracy, base.method_accuracy, [policy])
            left[policy] = of_k if at_any else UNKNOWN
        elif own and (lacking := sorted(set(options.k) - own)):
            sizes = ", ".join(map(str, lacking))
            left[f"{policy} of k = {sizes}"] = f"no accuracy is known of it{up_to}"
    used = {candidate.k for candidate in found if candidate.sized}
    useless = sorted(set(options.k) - used)
    if useless and (used or of_k in left.values()):
        raise UserError(f"--k: no accuracy is known of k = {useless[0]}{up_to}")
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
        rows = measured.accuracy_of_methods(options.accuracy_rows, options.bundle)
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
