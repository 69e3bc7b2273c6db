"""`codedinvnet fit`: from a file of measured times to a scenario, with a report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import percentile
from codedinvnet.files import check_writable, write_json
from codedinvnet.simulation.figures import aligned
from codedinvnet.simulation.fit import Fitted, draws, fit
from codedinvnet.simulation.picture import check_format, draw_fit
from codedinvnet.simulation.scenario import (
    Scenario,
    bundle_accuracy,
    load_scenario,
    parse_scenario,
)
from codedinvnet.simulation.task_times import read_measured

SHOWN = (0.5, 0.9, 0.99, 0.995, 0.999)
"""Quantiles that the report compares."""
MAY_BE_ZERO = {"encode", "front_end", "decode"}
"""Of a scenario: `plan` takes one that is not said for what is usual, so that 0 is written, too."""
ASSUMED = (
    "taken for granted: a time is from when the worker began to when it ended, without waiting;",
    "a delay is the worker's and not the input's, so that a copy has a draw of its own",
)
QUICK_MS = 0.1
"""Half of a log's tasks take less: its times may be in seconds."""
DIGITS = 3
"""Of what is shown, significant ones of the median."""
LOAD = 0.5
"""Of capacity, where no scenario says the load."""


def scenario_with(fitted: Fitted, base: Scenario | None, bundle: str | None, name: str) -> Scenario:
    """Return a scenario with the fitted times.

    The way to a worker and back is in the times of its tasks.

    Args:
        fitted: times and stragglers.
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
    if bundle is not None:
        changes |= {"bundle": bundle, "accuracy": None}
    if base is not None:
        if bundle is not None and base.bundle not in (None, bundle):
            changes["method_accuracy"] = {}  # is the other bundle's
        return base.updated(**changes)
    workers = len(fitted.workers)
    qps = round(LOAD * workers / (statistics.fmean(fitted.times) / 1000), 3)
    raw = {"name": name, "arrivals": {"qps": qps}, "workers": workers, "policy": "uncoded"}
    return parse_scenario({**raw, **changes}, name)


def run_fit(
    times: Path,
    out: Path,
    scenario: Path | None = None,
    bundle: str | None = None,
    picture: Path | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Fit a scenario to measured times, write it, and return a report and its lines.

    Args:
        times: the file of measured times.
        out: the scenario's file.
        scenario: the file of what else the scenario says.
        bundle: whose code and accuracy the scenario has.
        picture: the file of a picture, if there is to be one.

    Raises:
        UserError: if a file is wrong, before anything is written.
    """
    if picture is not None:
        check_format(picture)
    files = (times, scenario, out, picture)
    named = [path.resolve() for path in files if path is not None]
    if len(named) > len(set(named)):
        raise UserError("fit: what is written may not be what is read, nor each other")
    for path in (out, picture):
        if path is not None:
            check_writable(path)
    if bundle is not None:
        bundle_accuracy(bundle)  # there must be one, or nothing can be simulated
    base = None if scenario is None else load_scenario(scenario)
    fitted = fit(read_measured(times))
    found = scenario_with(fitted, base, bundle, times.stem)
    said = {"trip"} if base is None else {"trip", *(base.model_fields_set & MAY_BE_ZERO)}
    zeros = {key: 0.0 for key in sorted(said) if not getattr(found, key).mean_ms}
    write_json(out, found.model_dump(mode="json", exclude_defaults=True) | zeros)
    drawn, delays = draws(fitted)
    if picture is not None:
        draw_fit(fitted.times, drawn, picture)
    late = delays[delays >= fitted.delays.min()] if len(fitted.delays) else delays
    compared = len(fitted.delays) and len(late)
    median = float(np.median(fitted.times))
    places = min(9, max(1, DIGITS - 1 - math.floor(math.log10(median))))
    report = {
        "schema_version": 1,
        "kind": "fit",
        "tasks": len(fitted.times),
        "workers": {name: number for number, name in enumerate(fitted.workers)},
        "service_ms": round(fitted.service.mean_ms, max(4, places)),
        "stragglers": [s.model_dump(mode="json", exclude_defaults=True) for s in fitted.stragglers],
        "quantiles_ms": {
            f"{share:g}": [
                round(percentile(times, share), max(3, places)) for times in (fitted.times, drawn)
            ]
            for share in SHOWN
        },
        "late_share": [
            round(len(fitted.delays) / len(fitted.times), 5),
            round(len(late) / len(drawn), 5),
        ],
        "late_distance": round(float(ks_2samp(fitted.delays, late).statistic), 5)
        if compared
        else 0.0,
        "notes": [f"half of the tasks took less than {QUICK_MS:g} ms: are these seconds?"]
        if median < QUICK_MS
        else [],
        "out": str(out),
    }
    encode = "" if "encode" in said else " --encode-ms MS"
    return report, [
        *_lines(report, places),
        f"wrote {out}: codedinvnet plan {bundle or 'BUNDLE'} --scenario "
        f"{out}{encode} --qps QPS --p999-ms MS",
    ]


def _lines(report: Mapping[str, Any], places: int) -> list[str]:
    names = list(report["workers"])
    lines = [
        f"{report['tasks']} tasks of {len(names)} workers; "
        f"{report['service_ms']:.{max(2, places)}f} ms in the mean without stragglers",
        *report["notes"],
        "",
    ]
    for straggler in report["stragglers"]:
        whose = f"  (worker {names[straggler['worker']]})" if "worker" in straggler else ""
        lines.append(f"straggler  {json.dumps(straggler)}{whose}")
    was, comes = report["late_share"]
    return [
        *(lines if report["stragglers"] else [*lines, "no stragglers"]),
        "",
        *aligned(
            (
                {"share of tasks": share, "measured ms": measured, "fitted ms": fitted}
                for share, (measured, fitted) in report["quantiles_ms"].items()
            ),
            {"measured ms": f".{places}f", "fitted ms": f".{places}f"},
        ),
        "",
        f"late: {was:.2%} measured, {comes:.2%} fitted; the distribution functions of the delays "
        f"differ by {report['late_distance']:.3f} at most",
        *ASSUMED,
    ]
