"""How the predictions before switches of policy are judged."""

from __future__ import annotations

from typing import Any

from benchmarks.advised import MODELS, SWITCHES, completed, judged, lines, predicted
from codedinvnet.bench.latency_grid import injected
from tests.simulation.recording import traffic
from tests.simulation.scenarios import scenario


def row(
    predicted: float | None, then: float | None, best: str | None, **measured: float
) -> dict[str, Any]:
    return {
        "stragglers": "slower",
        "from": "uncoded",
        "to": "hedge",
        "advice": "hedge",
        "predicted_ms": predicted,
        "then_ms": then,
        "best_of_measured": best,
        "measured_p99_ms": measured,
    }


def test_predictions_and_the_best_policy_are_judged_apart() -> None:
    measured = {"uncoded": 300.0, "hedge": 100.0, "coded": 104.0}
    rows = [
        row(114.0, 100.0, "hedge", **measured),
        row(86.0, 100.0, "coded", **measured),  # as good as hedge
        row(116.0, 100.0, "uncoded", **measured),
        row(None, 100.0, None, **measured),
        row(100.0, None, "hedge", **measured),  # too many were lost
    ]
    found = judged(rows)
    assert found == {"switches": 5, "within_15_percent": 2, "best_named": 3}
    assert "2 of 5" in lines({**found, "rows": rows})[-1]


def test_advice_that_is_refused_predicts_nothing() -> None:
    raw = traffic(scenario(queries=100, workers=11, policy="uncoded"))
    found = predicted(raw, "none", "hedge", 1000, 0)
    assert found["predicted_ms"] is None
    assert "too few" in found["refused"]
    (whole,) = completed([{**found, "then_ms": 100.0}], {"uncoded": 90.0, "hedge": 100.0})
    assert judged([whole]) == {"switches": 1, "within_15_percent": 0, "best_named": 0}
    assert whole["refused"] in lines({**judged([whole]), "rows": [whole]})[1]


def test_twenty_switches_under_models_that_the_service_can_inject() -> None:
    assert sum(SWITCHES[model] for model in MODELS) == 20
    assert all(len(injected(model, 42.0, 10)) == (model != "none") for model in MODELS)
