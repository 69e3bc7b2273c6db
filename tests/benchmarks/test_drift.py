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


def curve(rate: float) -> Curve:
    return Curve(np.array([0.5]), np.array([5000]), np.array([round(5000 * rate)]))


def test_a_run_counts_what_is_released_of_a_drift_and_of_what_follows() -> None:
    curves = {DECODED: curve(0.004), GUESSED: curve(0.01)}
    sound = answers(0.004, 0.01, 0)
    stopped, share, back, before = one_run(0.01, curves, sound, answers(0.5, 0.5, 1), 0)
    assert 0 < stopped < 50
    assert (share, back, before) == (0.0, True, 1.0)
    stopped, share, back, before = one_run(0.01, curves, sound, sound, 0)
    assert stopped == DRIFTED
    assert 0 < share <= 0.01
    assert (back, before) == (True, 1.0)
