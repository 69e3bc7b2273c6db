"""`python -m benchmarks scheduling`: what the front end costs a query.

Two parts. The *rules*: the events of a simulated run are told to a scheduler of its own, and the
processor time is counted that it takes for them. The *simulator*: the processor time of a million
queries.
"""

from __future__ import annotations

import gc
import itertools
import time
from typing import Any

from pandas import DataFrame

from codedinvnet.codes.named_policies import served_as
from codedinvnet.evaluation import tables
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers

POLICIES = ("uncoded", "hedge", "coded", "small-backup", "small-backup+hedge", "auto")
WORKERS, BATCHES = (11, 1000), (1, 10)
LOAD = 0.5
QUERIES = {11: 30_000, 1000: 60_000}
"""Queries of a run by its workers; at 1,000 a run must last longer than the queue takes to form."""
RULES, SIMULATED = "rules, µs a query", "simulated, s a million"
FORMATS = dict.fromkeys((RULES, SIMULATED), ".1f")


def scenario(policy: str, workers: int, batch: int, queries: int) -> Scenario:
    """Return a service under load, with stragglers."""
    raw = {
        **{"name": policy, "workers": workers, "queries": queries, "k": 10},
        **{"accuracy": {"normal": 1, "recovered": {1: {10: 1}}}},
        **{"method_accuracy": {"small-backup": {10: 1}}, "arrivals": {"qps": 1, "batch": batch}},
        **{"service": {"distribution": "lognormal", "ms": 42, "shape": 0.03}, "trip": 1.3},
    }
    base = parse_scenario({**raw, **served_as(policy).scenario}, policy)
    model = stragglers("pareto", base.service.mean_ms, batch)
    causes = [straggler.model_dump() for straggler in model]
    return base.updated(qps=LOAD * base.capacity_qps, stragglers=causes)


class Recorder:
    """A scheduler's stand-in, which takes down what the scheduler is told."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.events: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._scheduler, name)
        if not callable(found):
            return found

        def told(*arguments: Any) -> Any:
            self.events.append((name, arguments))
            return found(*arguments)

        return told


def costs(given: Scenario) -> tuple[float, float]:
    """Return the microseconds of processor time a query takes: the rules alone, and simulated."""
    began = time.process_time()
    Simulation(given).run()
    simulated = time.process_time() - began
    run = Simulation(given)
    recorder = Recorder(run.scheduler)
    run.scheduler = recorder  # type: ignore[assignment]
    run.run()
    scheduler = Scheduler(given.rules, given.code)
    events = [(getattr(scheduler, name), arguments) for name, arguments in recorder.events]
    gc.collect()
    gc.freeze()  # a service has no such list of events to look through
    began = time.process_time()
    for event, arguments in events:
        event(*arguments)
    rules = time.process_time() - began
    gc.unfreeze()
    return 1e6 * rules / given.queries, 1e6 * simulated / given.queries


def processor(share: int = 1) -> list[dict[str, Any]]:
    """Return what scheduling and simulating costs, a row a policy and size.

    Args:
        share: part of the queries that are simulated.
    """
    rows = []
    for workers, policy, batch in itertools.product(WORKERS, POLICIES, BATCHES):
        rules, simulated = costs(scenario(policy, workers, batch, QUERIES[workers] // share))
        place = {"policy": policy, "workers": workers, "images": batch}
        rows.append({**place, RULES: rules, SIMULATED: simulated})
    return rows


def run(*, quick: bool) -> dict[str, Any]:
    """Measure, and return the rows with their table.

    Args:
        quick: a tenth of the queries.
    """
    frame = DataFrame(processor(10 if quick else 1))
    return {"rows": frame.to_dict("records"), "table": tables.markdown(frame, FORMATS).strip()}
