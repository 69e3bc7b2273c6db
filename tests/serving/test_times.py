from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.distributions import Distribution
from codedinvnet.serving.answers import Answered, Cancelled, QueryFailed
from codedinvnet.serving.recent import Recent
from codedinvnet.serving.times import Reservoir, Times


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
    times = Times()
    assert times.report() == {}
    for value in (0.002, 0.004):
        times.service.add(value)
        times.trip.add(-1e-9)  # two clocks may disagree by a little
    found = times.report()
    assert set(found) == {"service", "trip"}
    service = Distribution.model_validate(found["service"])
    assert service.mean_ms == pytest.approx(3)
    assert Distribution.model_validate(found["trip"]).mean_ms == 0


def test_recent_requests_and_work() -> None:
    recent = Recent()
    assert recent.summary(5.0, 0.1) is None
    for seconds in [*([0.1] * 98), 0.2, 3.0]:
        recent.request([Answered({}, "direct", 0.05), Answered({}, "decoded", seconds)])
    recent.request([Answered({}, "direct", 0.1), QueryFailed("lost")], read=0.5)
    recent.request([Cancelled()])  # it says nothing of the service
    for _ in range(202):
        recent.task(0.1)
    assert recent.summary(5.0, 0.1) == {"p50": 100.0, "p99": 200.0, "work": 1.0}
    assert recent.summary(5.0, 0.0) is None  # what a task takes is not known yet
    assert recent.summary(-1.0, 0.1) is None
