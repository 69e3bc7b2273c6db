from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from codedinvnet.simulation.stragglers import stragglers
from codedinvnet.simulation.warnings import Rare, drifts, rarest, too_short
from tests.simulation.scenarios import scenario

BURSTS = {"kind": "bursts", "qps": 100, "calm_ms": 9000, "burst_ms": 1000}


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("none", {}, None),
        ("slower", {}, None),
        ("none", {"arrivals": BURSTS}, Rare("burst of arrivals", 10)),
        ("bursts", {}, Rare("burst", 2)),
        ("held", {"batch": 10}, Rare("hold", 1)),
        ("hung", {}, Rare("hang", 40 / 0.1)),
        ("pareto", {}, Rare("hang timeout", 3)),
        ("pareto", {"deadline_ms": 2000}, Rare("hang timeout", 1.2)),
    ],
)
def test_what_is_rarest(name: str, changes: dict[str, Any], found: Rare | None) -> None:
    model = [straggler.model_dump() for straggler in stragglers(name, 10, 10)]
    arrivals = {} if "arrivals" in changes else {"qps": 100}
    given = scenario(**arrivals, **changes, workers=40, stragglers=model)
    rare = rarest(given, given.workers)
    assert (rare and rare.what) == (found and found.what)
    if rare is not None and found is not None:
        assert rare.every_s == pytest.approx(found.every_s)


def test_a_run_must_have_some_of_what_is_rare() -> None:
    rare = Rare("crash", 4.8)
    assert too_short(14.4, rare) == too_short(1, None) == []
    assert len(too_short(14.3, rare)) == 1


def test_a_run_drifts_if_requests_wait_ever_longer() -> None:
    generator = np.random.default_rng(0)
    times = generator.exponential(size=3000)
    assert not drifts(times, 1.0)
    assert drifts(times + np.linspace(0, 1, 3000), 1.0)
    assert not drifts(times + np.linspace(0, 1, 3000), 0.96)  # workers that wait can do the load
    assert not drifts(times + np.linspace(1, 0, 3000), 1.0)  # it began badly
    assert not drifts(times[:2], 1.0)
    assert not drifts(np.full(3000, math.inf), 1.0)
