"""Shares and intervals by hand, thresholds, and what is recommended."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codedinvnet.protect import calibration, measure
from codedinvnet.protect.measure import (
    CLOSE,
    Answers,
    Candidate,
    curve,
    interval,
    recommend,
    sureness,
    threshold,
)
from codedinvnet.trust.calibration import load_calibration
from codedinvnet.trust.confidence import log_probabilities


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


def test_methods_that_look_the_same_are_told_apart() -> None:
    twins = [candidate("a", 20, 0.1), candidate("a", 20, 0.1)]
    assert recommend(twins, 0).method == "a"


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
    alike = interval(np.ones(30, bool), np.repeat(np.arange(3), 10))
    assert alike == pytest.approx(interval(np.ones(3, bool), np.arange(3)))


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


def spread(name: str, wrong: int, cost: float, *, surest: bool, count: int = 1400) -> Candidate:
    """Return a method that errs where it is least sure, or evenly over all confidences."""
    agrees = np.ones(count, bool)
    at = count - 1 - np.arange(wrong) if surest else np.linspace(0, count - 1, wrong).astype(int)
    agrees[at] = False
    return Candidate(name, cost, made(agrees), made(agrees))


def test_of_two_that_agree_as_often_the_surer_one_is_recommended() -> None:
    code = spread("code", 487, 0.0999, surest=False)
    backup = spread("backup", 499, 0.1, surest=True)
    found = recommend([code, backup], 0)
    assert found.method == "backup"
    assert "surer" in found.reason
    assert recommend([code, spread("backup", 530, 0.09, surest=True)], 0).method == "code"


def test_of_two_that_are_as_sure_the_cheaper_one_is_recommended() -> None:
    dear, cheap = (spread(name, 100, cost, surest=True) for name, cost in (("a", 0.2), ("b", 0.1)))
    found = recommend([dear, cheap], 0)
    assert found.method == "b"
    assert "costs less than a" in found.reason
    same = [spread("c", 100, 0.1, surest=True), spread("d", 99, 0.1, surest=True)]
    assert recommend(same, 0).method == recommend(same[::-1], 0).method == "d"


def test_sureness_is_the_mean_over_all_coverages() -> None:
    answers = made(np.array([True, True, False, True]), np.array([0.9, 0.8, 0.7, 0.1]))
    assert sureness(answers, answers.rows) == pytest.approx((1 + 1 + 2 / 3 + 3 / 4) / 4)
    assert sureness(answers, np.array([2, 3])) == pytest.approx((0 + 1 / 2) / 2)
    backwards = replace(answers, confidence=1 - answers.confidence)
    assert sureness(backwards, answers.rows) < sureness(answers, answers.rows)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.2, 0.5, 0.9])), min_size=1))
def test_answers_of_equal_confidence_have_no_order(found: list[tuple[bool, float]]) -> None:
    agrees, confidence = (np.array(column) for column in zip(*found, strict=True))
    coverage, agreement = curve(confidence, agrees)
    assert coverage[-1] == 1
    assert agreement[-1] == pytest.approx(agrees.mean())
    assert curve(confidence[::-1], agrees[::-1])[1] == pytest.approx(agreement)
    constant = curve(np.ones(len(agrees)), agrees)[1]
    assert constant == pytest.approx(np.full(len(agrees), agrees.mean()))


@given(st.lists(st.integers(0, 60), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_agreement_counts_first_then_sureness_then_cost(errors: list[int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    costs = chance.permutation(len(errors)) / 10 + 0.05
    candidates = []
    for number, (wrong, cost) in enumerate(zip(errors, costs, strict=True)):
        answers = made(chance.permutation(np.arange(198) >= wrong), chance.random(198).round(1))
        candidates.append(Candidate(f"m{number}", cost, answers, answers))
    agreements = [candidate.calibration.agrees.mean() for candidate in candidates]
    level = {
        candidate.name: sureness(candidate.calibration, candidate.calibration.rows)
        for candidate, agreement in zip(candidates, agreements, strict=True)
        if agreement >= max(agreements) - CLOSE
    }
    cheap = {
        c.name: c.cost for c in candidates if level.get(c.name, 0) >= max(level.values()) - CLOSE
    }
    found = recommend(candidates, 0).method
    assert found == min(cheap, key=lambda name: cheap[name])
    assert recommend(candidates[::-1], 0).method == found


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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_agree_with_nothing(bad: float, tmp_path: Path) -> None:
    served = np.zeros(200, np.int64)  # what argmax makes of NaN
    scores = np.tile(np.array([3, 0, 1], np.float32), (200, 1))
    scores[:50] = bad
    scores[50:100, 2] = -np.inf  # a class that a model rules out
    answers = measure.answers_of(log_probabilities(scores, "logits"), np.arange(200), served, None)
    assert answers.agrees.tolist() == [False] * 50 + [True] * 150
    assert (threshold(answers, 0.95), threshold(answers, 0.75)) == (answers.confidence[199], 0)
    found = Candidate("code", 0.1, answers, answers, 10)
    assert measure.report(found)["agreement"].value == 0.75
    assert "25.0 %" in measure.report(found)["note"]
    calibration.save(tmp_path, [found], "digest")
    curve = load_calibration(tmp_path, "digest", "").curve("code", 10)
    assert curve is not None
    assert np.isfinite(curve.thresholds).all()
    assert (curve.released[-1], curve.disagreed[-1]) == (200, 50)


def test_the_table_has_accuracies_only_where_labels_are() -> None:
    rows = [measure.report(candidate("a", 100, 0.1))]
    assert "accuracy" not in measure.table(rows)
    answers = made(np.ones(100, bool))
    labelled = replace(answers, labels=np.zeros(100, int))
    rows.append(measure.report(Candidate("b", 0.1, labelled, labelled)))
    assert "accuracy" in measure.table(rows)
    assert rows[1]["accuracy"].value == 0.5
