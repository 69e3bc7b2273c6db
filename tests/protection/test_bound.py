"""The bound on disagreement: exact tails, thresholds, calibrated probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from codedinvnet.protection.bound import Curve, spread_of
from codedinvnet.protection.measure import coverage_at


def draw(random: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw answers in groups of ten, of which an unsure one disagrees more often."""
    confidences = random.random((groups, 10))
    return confidences, random.random((groups, 10)) >= 0.1 * (1 - confidences) ** 2


@pytest.mark.parametrize("limit", [0.01, 0.02])
def test_released_answers_exceed_the_limit_in_few_calibrations(limit: float) -> None:
    random = np.random.default_rng(1)
    expected, counted, coverage, oracle = 0, 0, [], []
    for _ in range(100):
        threshold = Curve.of(*draw(random, 1000)).threshold(limit)
        confidences, agrees = draw(random, 1000)
        chosen = confidences >= threshold
        expected += bool(0.1 * (1 - threshold) ** 2 / 3 > limit)
        counted += bool((~agrees)[chosen].mean() > limit)
        coverage.append(chosen.mean())
        oracle.append(coverage_at(confidences.ravel(), agrees.ravel(), 1 - limit))
    assert expected <= 4
    assert counted <= 8
    assert np.mean(coverage) > 0.7 * np.mean(oracle)


def test_thresholds_fall_with_the_limit_and_nothing_is_released_that_cannot_be_shown() -> None:
    curve = Curve.of(*draw(np.random.default_rng(2), 1000))
    thresholds = [curve.threshold(limit) for limit in (0.005, 0.01, 0.02, 0.5)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] == curve.thresholds[-1]
    assert curve.threshold(1e-5) == math.inf
    never = Curve.of(np.random.default_rng(3).random((100, 10)), np.zeros((100, 10), bool))
    assert never.threshold(0.5) == math.inf


@pytest.mark.parametrize(("unsure", "stricter"), [(2_000, True), (20_000, False)])
def test_the_strict_threshold_is_half_the_limits_where_that_leaves_enough(
    unsure: int, stricter: bool
) -> None:
    """All disagreements are of the less sure answers."""
    curve = Curve(np.array([0.9, 0.5]), np.array([48_000, 48_000 + unsure]), np.array([0, 300]))
    half = curve.threshold(0.005)
    assert (curve.threshold(0.01), half) == (0.5, 0.9)
    assert curve.strict_threshold(0.01) == (half if stricter else 0.5)


def test_answers_that_err_together_count_as_fewer() -> None:
    together = np.repeat(np.arange(200)[:, None] < 4, 10, axis=1)
    assert spread_of(together) > 9
    assert spread_of(np.eye(200, 10, dtype=bool)) == 1.0
    single = Curve(np.array([0.5]), np.array([2000]), np.array([10]), 1.0)
    joined = Curve(np.array([0.5]), np.array([2000]), np.array([10]), 10.0)
    assert single.threshold(0.01) == 0.5
    assert joined.threshold(0.01) == math.inf


@pytest.mark.parametrize(
    ("limit", "inputs"), [(0.05, 1_300), (0.02, 3_200), (0.01, 6_500), (0.005, 13_200)]
)
def test_so_many_inputs_a_limit_takes_as_the_page_on_protecting_says(
    limit: float, inputs: int
) -> None:
    """Of a backup that always agrees; 15 % of the inputs calibrate it."""

    def releases(count: int) -> bool:
        calibration = round(0.15 * count)
        confidences = np.linspace(0.5, 1.0, calibration)[:, None]
        agrees = np.ones((calibration, 1), bool)
        return not math.isinf(Curve.of(confidences, agrees).threshold(limit))

    assert releases(inputs)
    assert not releases(round(0.9 * inputs))


def test_no_threshold_behind_one_that_failed_is_taken() -> None:
    """Though more answers agree again there: the thresholds are tested one after another."""
    released, disagreed = np.array([2000, 2100, 9000]), np.array([2, 90, 92])
    curve = Curve(np.array([0.9, 0.8, 0.7]), released, disagreed)
    assert (
        Curve(curve.thresholds[[0, 2]], released[[0, 2]], disagreed[[0, 2]]).threshold(0.02) == 0.7
    )
    assert curve.threshold(0.02) == 0.9
