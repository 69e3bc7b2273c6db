"""`codedinvnet simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codedinvnet.codes.named_policies import check_extra, served_as
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json
from codedinvnet.common.provenance import describe_commit, describe_machine
from codedinvnet.simulation.figures import figure_lines, simulate
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from codedinvnet.simulation.warnings import overload, rarest, too_short


def run_simulate(scenario: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """Simulate a scenario; return a report and its lines.

    Args:
        scenario: its file.
        changes: fields of the scenario; None leaves its value.

    Raises:
        UserError: if a file or a value is wrong, before anything is simulated.
    """
    asked = {key: value for key, value in changes.items() if value is not None}
    base = parse_scenario(read_json(scenario), str(scenario))
    base = base.updated(**_changes(asked, base))
    figures = simulate(base, progress=True)
    notes = [
        *overload(base, figures["drifting"]),
        *too_short(figures["simulated_seconds"], rarest(base, base.workers)),
    ]
    provenance = {"machine": describe_machine(), "commit": describe_commit()}
    found = {**figures, "notes": notes, **provenance}
    return found, figure_lines(found, base)


def _changes(asked: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """Return what options change in a scenario."""
    own_r = {"r": asked["r"]} if "r" in asked else {}  # for the scenario to refuse
    changes, batch = dict(asked), asked.get("batch", scenario.arrivals.batch)
    if batch < 1:
        raise UserError(f"--batch: must be at least 1, got {batch}")
    check_extra(asked.get("extra"))
    if "policy" in asked:
        try:
            changes = {**changes, **served_as(changes.pop("policy")).scenario, **own_r}
        except UserError as error:
            raise UserError(f"--policy: {error}") from error
    if "stragglers" in asked:
        model = stragglers(asked["stragglers"], scenario.service.mean_ms, batch)
        changes["stragglers"] = [straggler.model_dump() for straggler in model]
    return changes
