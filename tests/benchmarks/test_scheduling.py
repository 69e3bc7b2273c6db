"""What scheduling costs: the same events cost the rules less than their simulation."""

from __future__ import annotations

import pytest

from benchmarks import scheduling
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.simulation.engine import Simulation


@pytest.mark.parametrize("policy", scheduling.POLICIES)
def test_a_scheduler_that_is_told_the_same_does_the_same(policy: str) -> None:
    given = scheduling.scenario(policy, 11, 10, 500)
    run, told = Simulation(given), Scheduler(given.rules, given.code)
    recorder = scheduling.Recorder(run.scheduler)
    run.scheduler = recorder  # type: ignore[assignment]
    records = run.run()
    for name, arguments in recorder.events:
        getattr(told, name)(*arguments)
    assert told.dispatcher.sent == records.tasks >= 500
    assert told.budget.queries == 500


def test_costs_are_of_a_query() -> None:
    rules, simulated = scheduling.costs(scheduling.scenario("coded", 11, 1, 1000))
    assert 1 < rules < 10_000
    assert 1 < simulated < 10_000
