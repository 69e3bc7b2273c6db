"""The check of the bound over random splits, on answers whose probabilities are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.trust import split_row
from codedinvnet.protect.bound import Curve


def answers(seed: int, groups: int = 2000, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences that are the probability of agreement, and whether answers agree."""
    random = np.random.default_rng(seed)
    sure = 1 - 0.2 * random.random((groups, k)) ** 2
    return sure, random.random((groups, k)) < sure


def test_splits_keep_the_limit_and_come_near_an_oracle() -> None:
    held_out, test = answers(0), answers(1)
    row = split_row(Curve.of(*held_out), held_out, test, 0.05, seed=0, splits=20)
    assert row["splits_above_limit"] <= 0.1
    assert 0 < row["disagreement"] <= 0.05
    assert 0.3 < row["coverage"] <= row["oracle_coverage"] <= 1
    assert row["test_disagreement"] == pytest.approx(row["stored_disagreement"], abs=0.02)
