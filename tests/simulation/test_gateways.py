"""Several gateways before the same servers: each alone, or with one scheduler for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.simulation.engine import Records, Simulation
from tests.simulation.scenarios import Watched, scenario

SERVERS: dict[str, Any] = {
    "workers": 8,
    "cores": 1,
    "slots": None,
    "policy": "hedge",
    "queries": 3000,
    "trip": 0.4,
}


def run(load: float, **changes: Any) -> Records:
    return Simulation(scenario(**SERVERS, qps=800 * load, **changes)).run()


def p99(records: Records) -> float:
    return float(np.quantile(records.latency[500:], 0.99))


def test_messages_that_take_no_time_make_one_gateway_of_several() -> None:
    alike = run(0.7, gateways=4, message_ms=0)
    assert np.allclose(alike.latency, run(0.7).latency)


@pytest.mark.parametrize("load", [0.4, 0.9])
def test_one_scheduler_is_worth_what_its_messages_cost(load: float) -> None:
    one, alone = run(load), run(load, gateways=4)
    together = run(load, gateways=4, message_ms=0.3)
    assert p99(together) < 1.2 * p99(one)
    assert p99(together) < 0.95 * p99(alone)


def test_each_message_takes_its_time() -> None:
    latency = run(0.05, gateways=10, message_ms=20).latency
    travels = latency > 0.045  # there and back; the first gateway has the scheduler itself
    assert 0.85 < travels.mean() < 0.95


def test_every_query_ends_once() -> None:
    held = {"kind": "hold", "probability": 0.05, "delay": 100}
    for message in (None, 5):
        settings = {**SERVERS, "gateways": 3, "message_ms": message, "deadline_ms": 90}
        simulation = Watched(scenario(**settings, qps=500, stragglers=[held]))
        found = simulation.run()
        assert sorted(simulation.ended) == list(range(3000))
        assert found.hedges
        clock = simulation.clock
        end = clock.now
        while any(scheduler.queries for scheduler in simulation.schedulers):
            clock.step()  # what tells the scheduler of the last answers is under way
        assert clock.now <= end + (message or 0) / 1000


def test_workers_of_a_service_have_one_front_end() -> None:
    with pytest.raises(UserError, match="several gateways"):
        scenario(gateways=2)
