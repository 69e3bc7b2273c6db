"""`codedinvnet fit`: from a file of measured times to a scenario, with a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.files import check_writable, write_json
from codedinvnet.quantiles import percentile
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.fit import Fitted, draws, fit
from codedinvnet.simulation.picture import check_format, draw_fit
from codedinvnet.simulation.scenario import (
    Scenario,
    bundle_accuracy,
    load_scenario,
    parse_scenario,
)
from codedinvnet.simulation.task_times import Measured, read_measured

SHOWN = (0.5, 0.9, 0.99, 0.995, 0.999)
"""Quantiles that the report compares."""
MAY_BE_ZERO = {"encode", "front_end", "decode"}
"""Of a scenario: `plan` takes one that is not said for what is usual, so that 0 is written, too."""
LOAD = 0.5
"""Of capacity, where no scenario says the load."""


def scenario_with(
    fitted: Fitted, measured: Measured, base: Scenario | None, bundle: str | None, name: str
) -> Scenario:
    """Return a scenario with the fitted times.

    The way to a worker and back is in the times of its tasks.

    Args:
        fitted: times and stragglers.
        measured: what they were fitted to.
        base: what else is simulated; None takes an uncoded service of as many workers, half busy.
        bundle: whose code and accuracy are simulated; None takes the base's.
        name: of the scenario, if there is no base.

    Raises:
        UserError: if a straggler is a worker that the base does not have.
    """
    changes: dict[str, Any] = {
        "service": fitted.service.model_dump(),
        "stragglers": [straggler.model_dump() for straggler in fitted.stragglers],
        "trip": 0.0,
    }
    if measured.encode is not None:
        changes["encode"] = measured.encode.model_dump()
    if bundle is not None:
        changes |= {"bundle": bundle, "accuracy": None}
    if base is not None:
        return base.updated(**changes)
    workers = len(measured.workers) + measured.idle
    qps = round(LOAD * workers / (statistics.fmean(fitted.times) / 1000), 3)
    raw = {"name": name, "arrivals": {"qps": qps}, "workers": workers, "policy": "uncoded"}
    return parse_scenario({**raw, **changes}, name)


@dataclass(frozen=True)
class FitOptions:
    """What `codedinvnet fit` was asked for; the command line explains the fields."""

    times: Path
    out: Path
    scenario: Path | None = None
    bundle: str | None = None
    picture: Path | None = None


def run_fit(options: FitOptions) -> tuple[dict[str, Any], list[str]]:
    """Fit a scenario to measured times, write it, and return a report and its lines.

    Raises:
        UserError: if a file is wrong, before anything is written.
    """
    if options.picture is not None:
        check_format(options.picture)
    files = (options.times, options.scenario, options.out, options.picture)
    named = [path.resolve() for path in files if path is not None]
    if len(named) > len(set(named)):
        raise UserError("fit: what is written may not be what is read, nor each other")
    for path in (options.out, options.picture):
        if path is not None:
            check_writable(path)
    if options.bundle is not None:
        bundle_accuracy(options.bundle)  # there must be one, or nothing can be simulated
    base = None if options.scenario is None else load_scenario(options.scenario)
    measured = read_measured(options.times)
    fitted = fit(measured.workers)
    scenario = scenario_with(fitted, measured, base, options.bundle, options.times.stem)
    said = {"trip"} if base is None else {"trip", *(base.model_fields_set & MAY_BE_ZERO)}
    if measured.encode is not None:
        said.add("encode")
    zeros = {key: 0.0 for key in sorted(said) if not getattr(scenario, key).mean_ms}
    write_json(options.out, scenario.model_dump(mode="json", exclude_defaults=True) | zeros)
    drawn, delays = draws(fitted)
    if options.picture is not None:
        draw_fit(fitted.times, drawn, options.picture)
    late = delays[delays >= fitted.delays.min()] if len(fitted.delays) else delays
    report = {
        "schema_version": 1,
        "kind": "fit",
        "tasks": len(fitted.times),
        "workers": {name: number for number, name in enumerate(fitted.workers)},
        "idle": measured.idle,
        "service_ms": round(fitted.service.mean_ms, 4),
        "encode_ms": None if measured.encode is None else round(measured.encode.mean_ms, 4),
        "stragglers": [s.model_dump(mode="json", exclude_defaults=True) for s in fitted.stragglers],
        "quantiles_ms": {
            f"{share:g}": [round(percentile(times, share), 3) for times in (fitted.times, drawn)]
            for share in SHOWN
        },
        "late_share": [
            round(len(fitted.delays) / len(fitted.times), 5),
            round(len(late) / len(drawn), 5),
        ],
        "late_distance": round(distance(fitted.delays, late), 5),
        "out": str(options.out),
    }
    whole = scenario.bundle is not None or scenario.accuracy is not None
    told = _next(options.out, options.bundle, whole, "encode" in said)
    return report, [*_lines(report), *told]


def distance(measured: np.ndarray, drawn: np.ndarray) -> float:
    """Return the largest difference of two samples' distribution functions (Kolmogorov-Smirnov).

    It is 0 if either is empty: then there is nothing to compare.
    """
    if not len(measured) or not len(drawn):
        return 0.0
    at = np.concatenate([measured, drawn])
    one, other = (np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (measured, drawn))
    return float(np.abs(one - other).max())


def _next(out: Path, bundle: str | None, whole: bool, encodes: bool) -> list[str]:
    """Return what can be done with a scenario.

    Args:
        out: the scenario.
        bundle: that was named.
        whole: whether the scenario has an accuracy, without which it cannot be simulated.
        encodes: whether it says what encoding takes.
    """
    encode = "" if encodes else " --encode-ms MS"
    lines = [f"codedinvnet simulate {out}"] if whole else []
    unknown = "what encoding takes is not known: plan with --encode-ms, or a --scenario's"
    return [
        *([] if encodes else [unknown]),
        f"wrote {out}, for:",
        *(f"  {line}" for line in lines),
        f"  codedinvnet plan {bundle or 'BUNDLE'} --scenario {out}{encode} --qps QPS --p999-ms MS",
    ]


def _lines(report: Mapping[str, Any]) -> list[str]:
    names = list(report["workers"])
    idle = f", {report['idle']} more did none" if report["idle"] else ""
    lines = [
        f"{report['tasks']} tasks of {len(names)} workers{idle}; "
        f"{report['service_ms']:.2f} ms in the mean without stragglers",
        "",
    ]
    lines += [f"straggler  {_words(straggler, names)}" for straggler in report["stragglers"]]
    lines += [] if report["stragglers"] else ["no stragglers"]
    lines += ["", f"{'share':<9}{'measured ms':>12}{'fitted ms':>12}"]
    for share, (was, comes) in report["quantiles_ms"].items():
        lines.append(f"{share:<9}{was:>12.1f}{comes:>12.1f}")
    was, comes = report["late_share"]
    lines += [
        "",
        f"late: {was:.2%} measured, {comes:.2%} fitted; the distribution functions of the delays "
        f"differ by {report['late_distance']:.3f} at most",
    ]
    return lines


def _words(straggler: Mapping[str, Any], names: Sequence[str]) -> str:
    worker = None if straggler.get("worker") is None else names[straggler["worker"]]
    if straggler["kind"] == "factor":
        return f"worker {worker} takes {straggler['factor']:g} times as long"
    delay = Distribution.model_validate(straggler["delay"])
    what = {
        "constant": f"{delay.ms:.1f} ms",
        "exponential": f"{delay.plus_ms:.1f} ms and an exponential time of {delay.ms:.1f} ms",
        "lognormal": f"a lognormal time of {delay.ms:.1f} ms in the median, deviation of its "
        f"logarithm {delay.shape:.2f}",
        "pareto": f"a Pareto time of {delay.ms:.1f} ms at least, exponent {delay.shape:.2f}",
        "empirical": f"the delays measured, {delay.mean_ms:.1f} ms in the mean",
    }[delay.distribution]
    whose = "the" if worker is None else f"worker {worker}'s"
    share = straggler.get("probability", 1.0)
    return f"{share:.2%} of {whose} tasks are delayed by {what}"
