"""Runs of drifting inputs, from answers that are known."""

from __future__ import annotations

import numpy as np

from benchmarks.drift import DRIFTED, Answers, K, one_run
from codedinvnet.trust.bound import Curve
from codedinvnet.trust.calibration import DECODED, GUESSED


def answers(decoded: float, guessed: float, seed: int) -> Answers:
    """Return sure answers that disagree at these rates."""
    random = np.random.default_rng(seed)
    agrees = random.random((400, K)) >= decoded
    return Answers(np.ones((400, K)), agrees, random.binomial(K, guessed, 400))


def curve(rate: float, surely: float) -> Curve:
    """Return one of half sure and sure answers, of whom these shares disagree."""
    wrong = np.array([round(50_000 * surely), round(50_000 * rate)])
    return Curve(np.array([0.9, 0.5]), np.array([48_000, 50_000]), wrong)


def test_a_run_counts_what_is_released_of_a_drift_and_of_what_follows() -> None:
    curves = {DECODED: curve(0.006, 0.0), GUESSED: curve(0.01, 0.01)}
    sound = answers(0.003, 0.01, 0)
    stopped, share, back, *released = one_run(0.01, curves, sound, answers(0.5, 0.5, 1), 0)
    assert 0 < stopped < 50
    assert (share, back, released) == (0.0, True, [1.0, 0.0])
    stopped, share, back, *released = one_run(0.01, curves, sound, sound, 0)
    assert stopped == DRIFTED
    assert 0 < share <= 0.01
    assert (back, released) == (True, [1.0, 1.0])


def test_a_weak_drift_is_met_by_releasing_less() -> None:
    """Half of the answers are less sure, and 2.6 % of these disagree: 1.3 % of all."""
    curves = {DECODED: curve(0.006, 0.0), GUESSED: curve(0.01, 0.01)}
    random = np.random.default_rng(2)
    confidences = np.where(random.random((400, K)) < 0.5, 0.6, 1.0)
    agrees = (confidences > 0.9) | (random.random((400, K)) >= 0.026)
    weak = Answers(confidences, agrees, random.binomial(K, 0.01, 400))
    kept, shares = [], []
    for seed in range(10):
        _, share, back, _, released = one_run(0.01, curves, answers(0.003, 0.01, 0), weak, seed)
        assert back
        kept.append(share <= 0.01)
        shares.append(released)
    assert sum(kept) >= 9
    assert 0.45 < np.mean(shares) < 1
