"""Scenarios of the tests, small enough to be simulated in a second."""

from __future__ import annotations

from typing import Any

from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.scenario import Scenario, parse_scenario


def scenario(**changes: Any) -> Scenario:
    """Return an uncoded service on one worker at half its capacity, unless told otherwise."""
    raw: dict[str, Any] = {
        "queries": 2000,
        "policy": "uncoded",
        "workers": 1,
        "service": 10,
        **changes,
    }
    if "arrivals" not in raw:
        raw["arrivals"] = {"qps": raw.pop("qps", 50.0), "batch": raw.pop("batch", 1)}
    return parse_scenario(raw, "test")


class Watched(Simulation):
    """A simulation that notes how every query ends."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.ended: list[int] = []

    def _finish(self, query: int) -> None:
        self.ended.append(query)
        super()._finish(query)
