"""How the predictions before switches of policy are judged."""

from __future__ import annotations

from typing import Any

from benchmarks.advised import MODELS, SWITCHES, judged, lines
from codedinvnet.bench.latency_grid import injected


def row(predicted: float, then: float, best: str, **measured: float) -> dict[str, Any]:
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
    ]
    found = judged(rows)
    assert found == {"switches": 3, "within_15_percent": 2, "best_named": 2}
    assert "2 of 3" in lines({**found, "rows": rows})[-1]


def test_twenty_switches_under_models_that_the_service_can_inject() -> None:
    assert sum(SWITCHES[model] for model in MODELS) == 20
    assert all(len(injected(model, 42.0, 10)) == (model != "none") for model in MODELS)
