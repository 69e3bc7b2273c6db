from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.serving.times import Reservoir, Times
from codedinvnet.simulation.distributions import Distribution


def test_a_reservoir_keeps_everything_until_it_is_full() -> None:
    kept = Reservoir(size=3)
    for value in (3.0, 1.0, 2.0):
        kept.add(value)
    assert (kept.values, kept.seen) == ([3.0, 1.0, 2.0], 3)


def test_a_full_reservoir_is_a_uniform_sample() -> None:
    kept = Reservoir(size=1000)
    for value in range(20_000):
        kept.add(float(value))
    assert (len(kept.values), kept.seen) == (1000, 20_000)
    assert len(set(kept.values)) == 1000
    early = np.mean(np.array(kept.values) < 5000)  # a quarter of all
    assert early == pytest.approx(0.25, abs=0.05)


def test_times_are_distributions_of_a_scenario() -> None:
    times = Times(workers=3)
    assert times.report() == {"tasks": [None, None, None]}
    for value in (0.002, 0.004):
        times.service.add(value)
        times.trip.add(-1e-9)  # two clocks may disagree by a little
        times.tasks[1].add(value + 0.001)
    found = times.report()
    assert set(found) == {"service", "trip", "tasks"}
    service = Distribution.model_validate(found["service"])
    assert service.mean_ms == pytest.approx(3)
    assert Distribution.model_validate(found["trip"]).mean_ms == 0
    assert (found["tasks"][0], found["tasks"][1]["seen"], found["tasks"][2]) == (None, 2, None)
    assert found["tasks"][1]["ms"] == [3, 5]


@pytest.mark.parametrize(("workers", "each"), [(1, 20_000), (11, 4545), (10_000, 500)])
def test_samples_of_many_workers_are_small(workers: int, each: int) -> None:
    assert {kept.size for kept in Times(workers).tasks} == {each}
