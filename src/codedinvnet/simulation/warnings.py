"""What a simulated run cannot be trusted for: overload, what is rare or hits few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codedinvnet.common.faults import Fault
from codedinvnet.common.quantiles import percentile
from codedinvnet.simulation.scenario import Scenario

FEWEST = 3
"""A run must be as long as so many of its rarest events take in the mean."""
GROWN = 1.25
"""A run drifts if the median of its last third is so many times that of its first."""
FULL = 0.97
"""Workers that are busy for less of their time can do the load."""
FEW_HIT = 0.1
"""The share of the workers from which stragglers of a fixed number of them matter."""


class Rare(NamedTuple):
    """What comes now and then."""

    what: str
    every_s: float
    """Seconds from one to the next, in the mean."""


def rarest(scenario: Scenario, workers: int) -> Rare | None:
    """Return what comes most rarely in a scenario with so many workers; None if nothing is rare."""
    arrivals = scenario.arrivals
    found = [_rare(straggler, scenario, workers) for straggler in scenario.stragglers]
    if any(straggler.kind in ("slow", "hang") for straggler in scenario.stragglers):
        found.append(Rare("hang timeout", scenario.hang_ms / 1000))
    if arrivals.kind == "bursts":
        found.append(Rare("burst of arrivals", (arrivals.calm_ms + arrivals.burst_ms) / 1000))
    return max((rare for rare in found if rare), key=lambda rare: rare.every_s, default=None)


def _rare(straggler: Fault, scenario: Scenario, workers: int) -> Rare | None:
    if straggler.kind == "factor":
        return None
    if straggler.every_s is not None:
        return Rare(straggler.kind, straggler.every_s)
    rate = max(straggler.probability * scenario.arrivals.qps, 1e-300)  # no division by zero
    if straggler.per_request:
        rate /= scenario.arrivals.batch
    if straggler.worker is not None:
        rate /= workers
    return Rare(straggler.kind, 1 / rate)


def too_short(seconds: float, rare: Rare | None, what: str = "The run lasts") -> list[str]:
    """Return a sentence, if a run of so many seconds is too short for its rarest event."""
    if rare is None or seconds >= FEWEST * rare.every_s:
        return []
    return [
        f"{what} {seconds:.1f} s, and the rarest event ({rare.what}) comes every "
        f"{rare.every_s:.4g} s: too short to judge by; more `queries` make it longer."
    ]


def drifts(latency: np.ndarray, utilisation: float) -> bool:
    """Return whether requests seem to wait ever longer: a longer run would have other percentiles.

    The load is too high then, though the run may end before many are late. Where workers have time
    to spare, rising medians are the chance of queues and of bursts.

    Args:
        latency: (n,) of the requests that count, in order of time.
        utilisation: share of the workers' time that they were busy.
    """
    if len(latency) < FEWEST or utilisation < FULL:
        return False
    first, middle, last = (percentile(part, 0.5) for part in np.array_split(latency, 3))
    return first < middle < last and last > GROWN * first


def overload(scenario: Scenario, drifting: bool) -> list[str]:
    """Return a sentence, if the load is more than the workers can do, or seems to be."""
    busy = scenario.busy_workers
    if busy >= scenario.workers:
        return [
            f"Overloaded: data tasks alone keep {busy:.1f} workers busy, and there are "
            f"{scenario.workers}; the longer the run, the later its answers."
        ]
    if drifting:
        return ["Requests seem to wait ever longer: the workers are too few."]
    return []


def few_hit(stragglers: Sequence[Fault], workers: int) -> list[str]:
    """Return a sentence, if stragglers hit a fixed number of workers, few of so many."""
    named = {straggler.worker for straggler in stragglers if straggler.worker is not None}
    hit = len(named) + sum(straggler.workers or 0 for straggler in stragglers)
    if not 0 < hit < FEW_HIT * workers:
        return []
    return [
        f"Stragglers are {hit} of {workers} workers, however many there are: if more of a larger "
        "service straggle, a scenario with more of them says so."
    ]
