"""Runs of drifting inputs, from answers that are known."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.drift import DRIFTED, Answers, K, one_run
from codedinvnet.protect.bound import Curve


def answers(decoded: float, guessed: float, seed: int) -> Answers:
    """Return sure answers that disagree at these rates."""
    random = np.random.default_rng(seed)
    agrees = random.random((400, K)) >= decoded
    return Answers(np.ones((400, K)), agrees, random.binomial(K, guessed, 400))


def run(sound: Answers, drifted: Answers, seed: int = 0) -> dict[str, Any]:
    """Return a run under a limit of 1 %, of which half the limit's threshold releases the sure."""
    wrong = np.array([0, round(50_000 * 0.006)])
    curve = Curve(np.array([0.9, 0.5]), np.array([48_000, 50_000]), wrong)
    thresholds = curve.threshold(0.01), curve.strict_threshold(0.01)
    return one_run(0.01, thresholds, K * 0.01, sound, drifted, seed)


def test_a_run_counts_what_is_released_of_a_drift_and_of_what_follows() -> None:
    sound = answers(0.003, 0.01, 0)
    found = run(sound, answers(0.5, 0.5, 1))
    assert 0 < found.pop("stopped") < 50
    assert found == {"share": 0.0, "back": True, "before": 1.0, "during": 0.0}
    found = run(sound, sound)
    assert found["stopped"] == DRIFTED
    assert 0 < found["share"] <= 0.01
    assert (found["back"], found["before"], found["during"]) == (True, 1.0, 1.0)


def test_a_weak_drift_is_met_by_releasing_less() -> None:
    """Half of the answers are less sure, and 2.6 % of these disagree: 1.3 % of all."""
    random = np.random.default_rng(2)
    confidences = np.where(random.random((400, K)) < 0.5, 0.6, 1.0)
    agrees = (confidences > 0.9) | (random.random((400, K)) >= 0.026)
    weak = Answers(confidences, agrees, random.binomial(K, 0.01, 400))
    found = [run(answers(0.003, 0.01, 0), weak, seed) for seed in range(10)]
    assert all(one["back"] for one in found)
    assert sum(one["share"] <= 0.01 for one in found) >= 9
    assert 0.45 < np.mean([one["during"] for one in found]) < 1
