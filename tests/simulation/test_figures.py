from __future__ import annotations

import math

import numpy as np
import pytest

from codedinvnet.common.quantiles import percentile
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.figures import (
    estimate,
    percentile_of,
    sections_for,
    share_of,
    summarise,
)
from tests.simulation.scenarios import scenario


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    generator, share, held = np.random.default_rng(0), 0.99, 0
    for _ in range(300):
        values = generator.exponential(size=20_000)
        found = estimate(values, lambda v: percentile(v, share), sections_for(20_000, share))
        assert found.interval is not None
        low, high = found.interval
        assert low < found.value < high
        held += low <= -math.log(1 - share) <= high
    assert 0.90 <= held / 300 <= 0.985


def test_an_interval_of_a_heavy_tail_is_a_factor() -> None:
    generator, share, held = np.random.default_rng(0), 0.999, 0
    truth = 10 * (1 - share) ** (-1 / 0.8)
    for _ in range(200):
        found = percentile_of(10 * (1 + generator.pareto(0.8, 60_000)), share)
        assert found.interval is not None
        low, high = found.interval
        assert 0 < low < found.value < high
        assert low * high == pytest.approx(found.value**2)
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.985
    assert percentile_of(np.zeros(60_000), share) == (0, None)


def test_figures_of_a_run() -> None:
    given = scenario(
        policy="coded",
        workers=33,  # so that no parity yields to a request that waits
        qps=200,
        batch=10,
        queries=10_000,
        encode=0.5,
        trip=1,
        warmup=0.1,
    )
    records = Simulation(given).run()
    found = summarise(records, given)
    counted = 1000 * records.latency[100:]
    assert found["p99_ms"] == pytest.approx(percentile(counted, 0.99), abs=1e-3)
    low, high = found["p50_ms_95"]
    assert low <= found["p50_ms"] <= high
    assert found["p999_ms_95"] is None  # 900 requests are too few
    assert found["tasks_per_query"] == pytest.approx(1.1, rel=0.005)
    assert found["work_per_query"] == pytest.approx(1.15, rel=0.005)  # a parity takes 10 + 5 ms
    assert found["utilisation"] == pytest.approx(200 * (11 + 0.1 * 16) / 33_000, rel=0.04)
    assert (found["requests"], found["queries"]) == (1000, 10_000)
    assert found["drifting"] is False


def test_lost_requests_count_as_infinitely_late() -> None:
    given = scenario(qps=200, queries=4000, deadline_ms=50)
    found = summarise(Simulation(given).run(), given)
    assert found["p99_ms"] is None
    assert found["missing_share"] > 0.1


def test_what_was_never_seen_may_still_be() -> None:
    never = share_of(np.zeros(300), 30, 300)
    assert never == (0, (0, 0.01))
    always = share_of(np.ones(60), 30, 300)
    assert always == (1, (0.99, 1))
    rare = np.zeros(3000)
    rare[7] = 1
    found = share_of(rare, 30, 3000)
    assert found.interval is not None
    assert found.interval[0] == 0  # no share is below none
