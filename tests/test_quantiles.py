from __future__ import annotations

import itertools

import numpy as np
import pytest

from codedinvnet.quantiles import SHARES, quantiles


def test_shares_rise_from_0_to_1_with_a_tail() -> None:
    assert SHARES[0] == 0
    assert SHARES[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(SHARES))
    assert {0.5, 0.9, 0.99, 0.999, 0.9999} <= set(SHARES)


def test_quantiles_are_those_of_the_values() -> None:
    found = dict(zip(SHARES, quantiles(range(10_001)), strict=True))
    assert found[0] == 0
    assert found[1] == 10_000
    assert found[0.5] == 5000
    assert found[0.999] == 9990
    assert quantiles([1.23456], digits=2) == [1.23] * len(SHARES)
    with pytest.raises(ValueError, match="no values"):
        quantiles(np.zeros(0))
