from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.serve_figures import latencies, summary, tail_ratios, wilson
from codedinvnet.bench.load import Reply
from tests.benchmarks.replies import canned


def test_requests_without_an_answer_are_the_slowest() -> None:
    answered = canned(0.02, 989)
    lost = [Reply("lost", (0,), 0.001, 503) for _ in range(11)]  # refused at once
    found = summary([*answered, *lost], np.zeros(10))
    assert found["errors"] == 11
    assert found["p50_ms"] > 30
    assert (found["p99_ms"], found["p999_ms"]) == (None, None)
    assert math.isinf(max(latencies(lost)))
    replies = {"none/uncoded": canned(0.02, 1000), "held/coded": [*answered, *lost]}
    ratios = tail_ratios(replies, ["coded"], "", 0)
    assert ratios["p999_ratio_coded"] is None
    assert ratios["p999_ratio_coded_95"][1] is None


def test_decoded_and_right_answers_are_shares_of_what_was_answered() -> None:
    def replied(rows: list[int], labels: list[int], outcomes: list[str]) -> Reply:
        return Reply("q", tuple(rows), 0.02, 200, labels=np.array(labels), outcomes=tuple(outcomes))

    truth = np.array([5, 6, 7, 8])
    replies = [
        replied([3, 2, 1, 0], [8, 7, 6, 0], ["direct", "decoded", "guessed", "decoded"]),
        replied([0, 1, 2, 3], [5, 6, 7, 0], ["direct"] * 4),
        replied([2, 3], [7, 8], ["direct"] * 2),
        Reply("lost", (0, 1), 0.02, 504),
    ]
    found = summary(replies, truth)
    assert (found["requests"], found["errors"]) == (4, 1)
    assert (found["decoded_share"], found["accuracy"]) == (0.3, 0.8)


def test_stretches_are_resampled_whole() -> None:
    """Twenty slow requests in a row are one event: a resample may well miss it."""
    times = [0.02] * 2000
    burst = times[:1000] + [0.2] * 20 + times[1020:]
    spread = [0.2 if i % 100 == 0 else 0.02 for i in range(2000)]

    def replies(values: list[float]) -> list[Reply]:
        return [Reply("q", (0,), value, 200) for value in values]

    def low(values: list[float]) -> float:
        arms = {"none/uncoded": replies(times), "held/coded": replies(values)}
        return float(tail_ratios(arms, ["coded"], "", 0)["p999_ratio_coded_95"][0])

    assert low(spread) == pytest.approx(10)
    assert low(burst) == pytest.approx(1)


def test_wilson() -> None:
    low, high = wilson(0.9, 100)
    assert (low, high) == pytest.approx((0.826, 0.945), abs=1e-3)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
