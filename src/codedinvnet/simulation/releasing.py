"""Which approximate answers a simulated service releases: the calibration of its bundle says it."""

from __future__ import annotations

from codedinvnet.codes.registry import find_method
from codedinvnet.errors import UserError
from codedinvnet.evaluation.trust import calibration_of
from codedinvnet.models.bundle import bundle_folder, weights_digest
from codedinvnet.simulation.scenario import Scenario
from codedinvnet.trust.bound import Coverage
from codedinvnet.trust.calibration import GUESSED

ALL = Coverage(1.0, 1.0, 0.0)
"""Without a limit everything is released."""


def coverages(scenario: Scenario) -> dict[int, Coverage]:
    """Return what is released of answers decoded in groups of each size; 0 stands for guessed ones.

    Raises:
        UserError: if the scenario has a limit on disagreement, and its code is not calibrated.
    """
    sizes, limit = range(scenario.k + 1), scenario.max_disagreement
    if limit is None or scenario.code is None or not scenario.code.r:
        return dict.fromkeys(sizes, ALL)
    if scenario.bundle is None:
        raise UserError(f"{scenario.name}: max_disagreement needs a bundle that is calibrated")
    folder = bundle_folder(scenario.bundle)
    method = find_method(scenario.method).name
    stored = calibration_of(folder, weights_digest(folder), method, scenario.k)
    found = {size: stored.coverage(method, size, limit) for size in sizes if size}
    if scenario.r > 1 or None in found.values():
        raise UserError(
            f"{scenario.name}: {scenario.bundle} is not calibrated for {method} with k = "
            f"{scenario.k}, r = {scenario.r}"
        )
    guessed = stored.coverage(method, scenario.k, limit, GUESSED)
    nothing = Coverage(0.0, 0.0, 1.0)
    return {0: guessed or nothing, **{size: one or nothing for size, one in found.items()}}
