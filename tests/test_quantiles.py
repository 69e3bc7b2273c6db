from __future__ import annotations

import math

import numpy as np
import pytest

from codedinvnet.common.quantiles import (
    SHARES,
    around,
    clustered_ci,
    percentile,
    quantiles,
    rank_of,
    rounded,
)


@pytest.mark.parametrize(
    ("share", "value"),
    [(0.0, 1), (0.5, 500), (0.99, 990), (0.9901, 991), (0.999, 999), (1.0, 1000)],
)
def test_a_percentile_is_the_lowest_value_that_its_share_does_not_exceed(
    share: float, value: float
) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, 1001))
    assert percentile(values, share) == percentile(values.tolist(), share) == value


@pytest.mark.parametrize("count", [1, 7, 100, 999, 1000, 10_000])
def test_ranks_are_counted_exactly(count: int) -> None:
    """Though shares are no binary fractions: 0.07 * 100 is more than 7."""
    for percent in range(1, 101):
        behind = count - 1 - rank_of(count, percent / 100)
        assert behind == count * (100 - percent) // 100


def test_infinite_values_are_the_last_and_rounded_to_none() -> None:
    values = [np.inf, 1.0, np.inf, 2.0]
    assert (percentile(values, 0.5), percentile(values, 0.51)) == (2, np.inf)
    values = [1.23456, np.float64(2.0), np.inf, -np.inf, np.nan]
    assert [rounded(value, 3) for value in values] == [1.235, 2.0, None, None, None]


def test_quantiles_are_those_of_the_values_with_a_tail() -> None:
    found = dict(zip(SHARES, quantiles(range(10_001)), strict=True))
    assert list(found) == sorted(found)
    wanted = {0: 0, 0.5: 5000, 0.9: 9000, 0.99: 9900, 0.999: 9990, 0.9999: 9999, 1: 10_000}
    assert {share: found[share] for share in wanted} == wanted
    assert quantiles([1.23456], digits=2) == [1.23] * len(SHARES)


def test_an_interval_of_cluster_means_leaves_out_what_clusters_differ_by() -> None:
    values, clusters = [1.0, 2.0, 3.0, 101.0, 102.0, 103.0], [1, 1, 1, 2, 2, 2]
    half = clustered_ci(values, clusters)
    assert half == pytest.approx(2.776445 * math.sqrt(2 / 3) / 2)  # t(0.975, 4), s = 1
    assert clustered_ci([1.0, 1.0, 5.0, 5.0], [1, 1, 2, 2], fewest=2) == 0
    for values, clusters in (([], []), ([1.0, 2.0], [1, 2]), ([1.0, 2.0, 3.0], [1, 1, 2])):
        assert clustered_ci(values, clusters, fewest=2) is None


def test_the_interval_of_a_difference_is_welchs() -> None:
    from scipy.stats import ttest_ind

    ours, theirs = [1.0, 2.0, 4.0], [0.0, 5.0]
    expected = ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    weights = {"a": 1.0, "b": -1.0}
    half = clustered_ci([*ours, *theirs], [*"aaabb"], weights=weights, fewest=2)
    assert half == pytest.approx((expected.high - expected.low) / 2)


def test_intervals_are_students_over_repetitions() -> None:
    assert clustered_ci([1.0, 2.0]) is None
    assert clustered_ci([1.0, math.inf, 2.0]) is None
    half = clustered_ci([1.0, 2.0, 3.0])
    assert half == pytest.approx(4.302653 / math.sqrt(3))  # t(0.975, 2) s / sqrt(n), s = 1
    low, high = around([10.0, 20.0, 40.0], 20.0) or (0.0, 0.0)
    assert low * high == pytest.approx(400)
    assert around([0.0, 1.0, 2.0], 1.0) is None
