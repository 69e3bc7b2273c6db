"""Shares and intervals by hand, thresholds, and what is recommended."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from codedinvnet.protect import measure
from codedinvnet.protect.measure import Answers, Candidate, interval, recommend, threshold


def made(agrees: np.ndarray, confidence: np.ndarray | None = None) -> Answers:
    """Return answers to inputs of classes 0 and 1 by turns, right where they agree."""
    served = np.arange(len(agrees)) % 2
    if confidence is None:
        confidence = np.linspace(0.9, 0.1, len(agrees))
    answers = np.where(agrees, served, 1 - served)
    return Answers(np.arange(len(agrees)), answers, confidence, served, np.arange(len(agrees)))


def candidate(name: str, wrong: int, cost: float, count: int = 2000, shift: int = 0) -> Candidate:
    """Return a method that errs on so many of the inputs, from `shift` on."""
    agrees = np.ones(count, bool)
    agrees[shift : shift + wrong] = False
    return Candidate(name, cost, made(agrees), made(agrees))


def test_the_interval_is_wilsons() -> None:
    hits = np.arange(10) < 8
    found = interval(hits, np.arange(10))
    assert found == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-3)
    assert interval(np.ones(10, bool), np.arange(10))[1:] == pytest.approx((0.7225, 1.0), abs=1e-3)


def test_answers_that_err_together_count_for_one() -> None:
    hits = np.repeat(np.arange(10) < 8, 5)
    together = interval(hits, np.repeat(np.arange(10), 5))
    assert together == pytest.approx(interval(np.arange(10) < 8, np.arange(10)), abs=1e-6)
    assert interval(hits, np.arange(50)).low > together.low


def test_the_threshold_releases_as_much_as_it_may() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    answers = made(np.array([True, True, False, True, False]), confidence)
    assert threshold(answers, 0.95) == 0.8
    assert threshold(answers, 0.75) == 0.6
    assert threshold(answers, 0.5) == 0.5
    assert threshold(made(np.array([False, True]), np.array([0.9, 0.8])), 0.95) == math.inf


def test_equal_confidences_are_released_together() -> None:
    answers = made(np.array([True, True, False]), np.array([0.9, 0.5, 0.5]))
    assert threshold(answers, 0.95) == 0.9


def test_coverage_is_told_of_test_inputs_alone() -> None:
    calibration = made(np.array([True, False]), np.array([0.9, 0.4]))
    test = made(np.array([True, False, True, True]), np.array([0.95, 0.92, 0.8, 0.1]))
    row = measure.report(Candidate("a", 0.1, calibration, test))
    found = row["coverage"]["0.95"]
    assert found["threshold"] == 0.9
    assert found["coverage"].value == 0.5
    assert found["agreement"].value == 0.5
    assert row["agreement"].value == 0.75


def test_the_best_is_recommended_and_the_cheaper_one_if_they_are_close() -> None:
    best, close, worse = (
        candidate("best", 100, 0.1),
        candidate("close", 105, 0.05),
        candidate("worse", 300, 0.01),
    )
    assert recommend([worse, best], 0).method == "best"
    assert recommend([worse, best, close], 0).method == "close"
    assert recommend([worse, candidate("dear", 0, 0.6), best], 0).method == "best"


def test_test_inputs_have_no_part_in_the_choice() -> None:
    """Whatever the test inputs show, the first is better on the calibration inputs."""

    def one(name: str, calibration: int, test: int) -> Candidate:
        first, second = (made(np.arange(200) >= wrong) for wrong in (calibration, test))
        return Candidate(name, 0.1, first, replace(second, rows=second.rows + 200))

    for test in (5, 50, 199):
        both = [one("first", 10, test), one("other", 15, 30)]
        assert recommend(both, 0).method == recommend(both[::-1], 0).method == "first"


def test_what_guesses_no_better_is_not_recommended() -> None:
    useless = candidate("useless", 1000, 0.01)
    found = recommend([useless], 0)
    assert found.method is None
    assert "most frequent class" in found.reason
    both = recommend([useless, candidate("good", 100, 0.1)], 0)
    assert both.method == "good"
    assert "useless" in both.reason


def test_differences_are_paired_on_the_inputs_of_both() -> None:
    one = made(np.ones(100, bool))
    other = made(np.arange(100) >= 10)
    gap = measure.difference(one, other)
    assert gap.value == pytest.approx(0.1)
    assert 0 < gap.low < 0.1 < gap.high
    half = replace(
        other,
        rows=other.rows[10:],
        answers=other.answers[10:],
        served=other.served[10:],
        groups=other.groups[10:],
    )
    assert measure.difference(one, half).value == 0


def test_the_table_has_accuracies_only_where_labels_are() -> None:
    rows = [measure.report(candidate("a", 100, 0.1))]
    assert "accuracy" not in measure.table(rows)
    answers = made(np.ones(100, bool))
    labelled = replace(answers, labels=np.zeros(100, int))
    rows.append(measure.report(Candidate("b", 0.1, labelled, labelled)))
    assert "accuracy" in measure.table(rows)
    assert rows[1]["accuracy"].value == 0.5
