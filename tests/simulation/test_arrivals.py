"""Arrivals that a seed repeats."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.simulation.arrivals import poisson_gaps


def test_gaps_are_exponential_and_of_their_seed() -> None:
    gaps = poisson_gaps(20.0, 20_000, 1)
    assert gaps[:100] == poisson_gaps(20.0, 100, 1)  # a longer run begins as the shorter one
    assert gaps[:100] != poisson_gaps(20.0, 100, 2)
    assert np.mean(gaps) == pytest.approx(0.05, rel=0.03)
    assert np.std(gaps) == pytest.approx(0.05, rel=0.03)
