"""How the predictions before switches of policy are judged."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import advised
from benchmarks.advised import (
    MODELS,
    SWITCHES,
    Late,
    completed,
    judged,
    late_of,
    lines,
    predicted,
    switches,
)
from codedinvnet.errors import UserError
from codedinvnet.evaluation.latency_grid import injected
from tests.simulation.recording import traffic
from tests.simulation.scenarios import scenario


def row(
    predicted: float | None, then: float | None, best: str | None, **measured: Late
) -> dict[str, Any]:
    return {
        "stragglers": "slower",
        "from": "uncoded",
        "to": "hedge",
        "advice": "hedge",
        "predicted_ms": predicted,
        "then_ms": then,
        "best_of_measured": best,
        "measured_p99_ms": {name: late.whole for name, late in measured.items()},
        "halves_p99_ms": {name: list(late.halves) for name, late in measured.items()},
    }


def test_predictions_and_the_best_policy_are_judged_apart() -> None:
    measured = {
        "uncoded": Late(300.0, (280.0, 320.0)),
        "hedge": Late(100.0, (95.0, 107.0)),
        "coded": Late(104.0, (106.0, 100.0)),
    }
    rows = [
        row(114.0, 100.0, "hedge", **measured),
        row(86.0, 100.0, "coded", **measured) | {"advice": "coded"},  # as good as hedge
        row(116.0, 100.0, "uncoded", **measured) | {"advice": "uncoded"},
        row(None, 100.0, None, **measured) | {"advice": None},
        row(100.0, None, "hedge", **measured) | {"advice": "uncoded"},  # too many were lost
    ]
    found = judged(rows)
    assert found == {
        "switches": 5,
        "within_15_percent": 2,
        "lowest_predicted_best": 3,
        "advice_best": 2,  # the last one stays with what is slow
        "halves_within_15_percent": 5,
        "halves_best_named": 0,  # hedge; by the second ones it is coded
        "one_policy_best": 5,
    }
    other = {**measured, "uncoded": Late(50.0, (50.0, 50.0))}
    assert judged([*rows, row(1.0, 1.0, "uncoded", **other)])["one_policy_best"] == 5
    told = lines({**found, "rows": rows})
    assert told[0].splitlines()[-1].endswith("| hedge | uncoded |")
    assert "in 2 of 5 switches" in told[-1]
    assert "lowest prediction was right in 3 of 5, and the advice in 2." in told[-1]


def test_halves_tell_what_no_advice_can_foretell() -> None:
    found = late_of([1.0] * 199 + [9.0] + [2.0] * 190 + [5.0] * 10)
    assert found == (5.0, (1.0, 5.0))
    assert judged([row(5.0, 5.0, "hedge", hedge=found)])["halves_within_15_percent"] == 0
    lost = late_of([1.0] * 100 + [math.inf] * 100)
    (whole,) = completed([{**row(None, None, None), "all_predicted_ms": {}}], {"hedge": lost})
    assert whole["halves_p99_ms"] == {"hedge": [1.0, None]}
    assert judged([whole])["halves_best_named"] == 0


def test_advice_that_is_refused_predicts_nothing() -> None:
    raw = traffic(scenario(queries=100, workers=11, policy="uncoded"))
    found = predicted(raw, "none", "hedge", 1000, 0)
    assert found["predicted_ms"] is None
    assert "too few" in found["refused"]
    (whole,) = completed(
        [{**found, "then_ms": 100.0}],
        {"uncoded": Late(90.0, (90.0, 90.0)), "hedge": Late(100.0, (100.0, 100.0))},
    )
    scores = judged([whole])
    assert (scores["within_15_percent"], scores["lowest_predicted_best"]) == (0, 0)
    assert scores["advice_best"] == 0
    assert (scores["halves_within_15_percent"], scores["halves_best_named"]) == (1, 1)
    assert whole["refused"] in lines({**scores, "rows": [whole]})[0]


def test_twenty_switches_under_models_that_the_service_can_inject() -> None:
    assert sum(SWITCHES[model] for model in MODELS) == 20
    assert all(len(injected(model, 42.0, 10)) == (model != "none") for model in MODELS)


def test_each_straggler_model_meets_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def serving(*_: Any, seed: int, **__: Any) -> None:
        seeds.append(seed)
        raise UserError("enough is known")

    monkeypatch.setattr(advised, "serving", serving)
    for model in (*MODELS, MODELS[0]):
        with pytest.raises(UserError, match="enough"):
            asyncio.run(switches(model, True, 0, Path("log")))
    assert len(set(seeds)) == len(MODELS)
    assert seeds[0] == seeds[-1]
    assert max(seeds) < 2**31  # a scenario takes no more


def test_finished_models_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def switches(model: str, *_: Any) -> list[dict[str, Any]]:
        asked.append(model)
        if asked == ["exponential", "slower"]:
            raise KeyboardInterrupt
        late = Late(100.0, (99.0, 101.0))
        return [{**row(100.0, 100.0, "hedge", hedge=late), "stragglers": model}]

    monkeypatch.setattr(advised, "switches", switches)
    out = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        advised.run(out, quick=True)
    for _ in range(2):
        assert advised.run(out, quick=True)["advice_best"] == 2
        assert asked == ["exponential", "slower", "slower"]
    with pytest.raises(UserError, match="holds another report"):
        advised.run(out, quick=True, seed=1)
