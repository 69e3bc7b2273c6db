"""What `advise` predicts before twenty switches of policy, by traffic of a simulated service."""

from __future__ import annotations

from benchmarks import advised
from codedinvnet.simulation.figures import simulate_requests
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers
from tests.simulation.recording import traffic

ENOUGH = 17
"""Of twenty switches."""


def served(policy: str, model: str, seed: int) -> Scenario:
    """Return what the benchmark loads, with as many requests."""
    causes = stragglers(model, advised.SERVICE, advised.BATCH)
    raw = {
        "seed": seed,
        "queries": advised.REQUESTS * advised.BATCH,
        "warmup": 0.0,
        "arrivals": {
            "qps": advised.LOAD * 1000 * advised.WORKERS / advised.SERVICE,
            "batch": advised.BATCH,
        },
        "workers": advised.WORKERS,
        "k": advised.K,
        "policy": policy,
        "service": {"distribution": "lognormal", "ms": advised.SERVICE, "shape": 0.03},
        "encode": advised.ENCODE,
        "group_timeout_ms": 50,
        "accuracy": {"normal": 0.99, "recovered": {1: {advised.K: 0.9}}},
        "stragglers": [cause.model_dump() for cause in causes],
    }
    return parse_scenario(raw, "test")


def test_predictions_come_true_and_the_best_policy_is_named() -> None:
    rows = []
    for model in advised.MODELS:
        order, measured, own = advised.order_of(model), dict[str, advised.Late](), []
        for place, policy in enumerate(order):
            late, _ = simulate_requests(served(policy, model, 1000))
            measured[policy] = advised.late_of(late.tolist())
            if place:
                raw = traffic(served(order[place - 1], model, place), offered=advised.POLICIES)
                found = advised.predicted(raw, model, policy, 20_000, 7)
                own.append({**found, "then_ms": round(measured[policy].whole, 2)})
        rows += advised.completed(own, measured)
    found = advised.judged(rows)
    print("\n".join(advised.lines({**found, "rows": rows})))
    assert found["switches"] == 20
    assert found["within_15_percent"] >= ENOUGH
    assert found["lowest_predicted_best"] >= ENOUGH
