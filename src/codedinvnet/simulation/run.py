"""`codedinvnet simulate`: one scenario, or a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codedinvnet.codes.named_policies import check_extra, served_as
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json
from codedinvnet.common.provenance import describe_commit, describe_machine
from codedinvnet.simulation.figures import figure_lines, simulate
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from codedinvnet.simulation.sweep import (
    Sweep,
    frame_of,
    lines_of,
    parse_sweep,
    quick_sweep,
    run_sweep,
    warnings_of,
    winners,
)
from codedinvnet.simulation.warnings import overload, rarest, too_short


def run_simulate(
    scenario: Path,
    *,
    out: Path | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    **changes: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Simulate a scenario or run a sweep; return a report and its lines.

    Args:
        scenario: the file of either.
        out: file of a sweep's rows.
        quick: simulate few queries in each place of a sweep.
        only: words such as `policy=hedge` that choose places of a sweep.
        changes: fields of the scenario; None leaves its value.

    Raises:
        UserError: if a file or a value is wrong, before anything is simulated.
    """
    asked = {key: value for key, value in changes.items() if value is not None}
    raw = read_json(scenario)  # once: it may be a pipe
    if (sweep := parse_sweep(raw, scenario)) is not None:
        if asked:
            raise UserError(f"{scenario} is a sweep: its file says everything that is simulated")
        if out is None:
            raise UserError(f"{scenario} is a sweep: name the file of its rows with --out")
        return _sweep(quick_sweep(sweep) if quick else sweep, out, only)
    for option, given in (("--quick", quick), ("--out", out), ("--only", only)):
        if given:
            raise UserError(f"{option} belongs to a sweep (see configs/bench)")
    base = parse_scenario(raw, str(scenario))
    base = base.updated(**_changes(asked, base))
    figures = simulate(base, progress=True)
    notes = [
        *overload(base, figures["drifting"]),
        *too_short(figures["simulated_seconds"], rarest(base, base.workers)),
    ]
    provenance = {"machine": describe_machine(), "commit": describe_commit()}
    found = {**figures, "notes": notes, **provenance}
    return found, figure_lines(found, base)


def _sweep(sweep: Sweep, out: Path, only: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    rows = run_sweep(sweep, out, only)
    frame, notes = frame_of(rows), warnings_of(rows)
    wins = winners(frame).to_dict("records")
    report = {"schema_version": 1, "kind": "map", "rows": len(frame), "wins": wins, "notes": notes}
    return report, [*lines_of(frame), *([""] if notes else []), *notes]


def _changes(asked: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """Return what the given options change in a scenario."""
    changes, batch = dict(asked), asked.get("batch", scenario.arrivals.batch)
    if batch < 1:
        raise UserError(f"--batch: must be at least 1, got {batch}")
    check_extra(asked.get("extra"))
    if "policy" in asked:
        try:
            changes |= served_as(asked["policy"]).scenario
        except UserError as error:
            raise UserError(f"--policy: {error}") from error
    if "stragglers" in asked:
        model = stragglers(asked["stragglers"], scenario.service.mean_ms, batch)
        changes["stragglers"] = [straggler.model_dump() for straggler in model]
    return changes
