"""`codedinvnet fit`: from a file of measured times to a scenario, with a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codedinvnet.checkpoint import check_writable, write_json
from codedinvnet.quantiles import percentile
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.fit import Fitted, distance, draws, fit
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
        changes["bundle"] = bundle
    if base is not None:
        return base.updated(**changes)
    workers = len(measured.workers)
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
    for path in (options.out, options.picture):
        if path is not None:
            check_writable(path)
    if options.bundle is not None:
        bundle_accuracy(options.bundle)  # there must be one, or nothing can be simulated
    base = None if options.scenario is None else load_scenario(options.scenario)
    measured = read_measured(options.times)
    fitted = fit(measured.workers)
    scenario = scenario_with(fitted, measured, base, options.bundle, options.times.stem)
    write_json(options.out, scenario.model_dump(mode="json", exclude_defaults=True))
    drawn = draws(fitted)
    if options.picture is not None:
        draw_fit(fitted.times, drawn, options.picture)
    report = {
        "schema_version": 1,
        "kind": "fit",
        "tasks": len(fitted.times),
        "workers": len(measured.workers),
        "service_ms": round(fitted.service.mean_ms, 4),
        "stragglers": [s.model_dump(mode="json", exclude_defaults=True) for s in fitted.stragglers],
        "quantiles_ms": {
            f"{share:g}": [round(percentile(times, share), 3) for times in (fitted.times, drawn)]
            for share in SHOWN
        },
        "distance": round(distance(fitted.times, drawn), 5),
        "out": str(options.out),
    }
    whole = scenario.bundle is not None or scenario.accuracy is not None
    return report, [*_lines(report), *_next(options.out, options.bundle, whole)]


def _next(out: Path, bundle: str | None, whole: bool) -> list[str]:
    """Return what can be done with a scenario; without an accuracy it is not whole."""
    lines = [f"codedinvnet simulate {out}"] if whole else []
    return [
        f"wrote {out}, for:",
        *(f"  {line}" for line in lines),
        f"  codedinvnet plan {bundle or 'BUNDLE'} --scenario {out} --qps QPS --p999-ms MS",
    ]


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{report['tasks']} tasks of {report['workers']} workers, "
        f"{report['service_ms']:.2f} ms in the mean without stragglers",
        "",
    ]
    lines += [f"straggler  {_words(straggler)}" for straggler in report["stragglers"]]
    lines += [] if report["stragglers"] else ["no stragglers"]
    lines += ["", f"{'share':<9}{'measured ms':>12}{'fitted ms':>12}"]
    for share, (was, comes) in report["quantiles_ms"].items():
        lines.append(f"{share:<9}{was:>12.1f}{comes:>12.1f}")
    lines += [
        "",
        f"distribution functions differ by {report['distance']:.4f} at most",
    ]
    return lines


def _words(straggler: Mapping[str, Any]) -> str:
    if straggler["kind"] == "factor":
        return f"worker {straggler['worker']} takes {straggler['factor']:g} times as long"
    delay = Distribution.model_validate(straggler["delay"])
    what = {
        "constant": f"{delay.ms:.1f} ms",
        "exponential": f"{delay.plus_ms:.1f} ms and an exponential time of {delay.ms:.1f} ms",
        "lognormal": f"a lognormal time of {delay.ms:.1f} ms in the median, deviation of its "
        f"logarithm {delay.shape:.2f}",
        "pareto": f"a Pareto time of {delay.ms:.1f} ms at least, exponent {delay.shape:.2f}",
    }[delay.distribution]
    return f"{straggler['probability']:.2%} of the tasks are delayed by {what}"
