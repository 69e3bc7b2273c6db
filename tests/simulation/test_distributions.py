from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from codedinvnet.common.distributions import CHUNK, Distribution, uniforms
from codedinvnet.common.quantiles import SHARES, quantiles

EMPIRICAL: dict[str, Any] = {"distribution": "empirical", "values_ms": [1, 2, 3]}
MODELS: list[tuple[dict[str, Any], Any]] = [
    ({"distribution": "exponential", "ms": 7}, stats.expon(scale=7)),
    ({"distribution": "lognormal", "ms": 7, "shape": 0.5}, stats.lognorm(0.5, scale=7)),
    ({"distribution": "pareto", "ms": 7, "shape": 2.5}, stats.pareto(2.5, scale=7)),
    ({"distribution": "empirical", "values_ms": [4, 2, 8]}, None),
]


@pytest.mark.parametrize(("raw", "exact"), MODELS, ids=[raw["distribution"] for raw, _ in MODELS])
def test_draws_follow_the_distribution(raw: dict[str, Any], exact: Any) -> None:
    draws = 1000 * Distribution(**raw).draw(np.random.default_rng(0), 20_000)
    if exact is None:  # piecewise uniform: half between 2 and 4, half between 4 and 8
        assert np.mean(draws < 4) == pytest.approx(0.5, abs=0.01)
        assert draws.min() >= 2
        assert draws.max() <= 8
    else:
        assert stats.kstest(draws, exact.cdf).pvalue > 0.01


@pytest.mark.parametrize("raw", [raw for raw, _ in MODELS])
def test_the_mean_is_that_of_the_draws(raw: dict[str, Any]) -> None:
    distribution = Distribution(**raw, plus_ms=3)
    draws = 1000 * distribution.draw(np.random.default_rng(1), 400_000)
    assert draws.mean() == pytest.approx(distribution.mean_ms, rel=0.02)


def test_uneven_quantiles_carry_a_tail() -> None:
    sample = np.random.default_rng(2).pareto(3, 100_000)
    fitted = Distribution(
        distribution="empirical", values_ms=tuple(quantiles(sample)), shares=SHARES
    )
    draws = 1000 * fitted.draw(np.random.default_rng(3), 100_000)
    for share in (0.1, 0.5, 0.9, 0.99, 0.999):
        assert np.quantile(draws, share) == pytest.approx(np.quantile(sample, share), rel=0.2)
    assert draws.mean() == pytest.approx(fitted.mean_ms, rel=0.1)
    uneven = Distribution(distribution="empirical", values_ms=(0, 10, 110), shares=(0, 0.9, 1))
    assert uneven.mean_ms == pytest.approx(0.9 * 5 + 0.1 * 60)


def test_streams_go_on_beyond_a_chunk_and_repeat() -> None:
    model = Distribution(distribution="exponential", ms=1)
    one, again = (
        list(itertools.islice(model.stream(np.random.default_rng(5)), CHUNK + 10)) for _ in "ab"
    )
    assert one == again
    assert len(set(one)) == CHUNK + 10
    shares = list(itertools.islice(uniforms(np.random.default_rng(5)), CHUNK + 10))
    assert 0 <= min(shares) < 0.01
    assert 0.99 < max(shares) < 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"distribution": "empirical"}, "has values_ms"),
        ({"distribution": "constant", "values_ms": [1]}, "no other has"),
        ({"distribution": "empirical", "values_ms": [-1]}, "greater than or equal to 0"),
        ({"distribution": "pareto", "ms": 1, "shape": 0}, "greater than 0"),
        ({"distribution": "gamma", "ms": 1}, "constant"),
        ({"ms": -1}, "greater than or equal to 0"),
        ({"ms": math.inf}, "finite"),
        ({**EMPIRICAL, "shares": [0, 1]}, "one for each"),
        ({**EMPIRICAL, "shares": [0, 0.5, 0.9]}, "rise from 0 to 1"),
        ({**EMPIRICAL, "shares": [0, 1, 1]}, "rise from 0 to 1"),
        (True, "dictionary"),
    ],
)
def test_what_is_no_distribution(raw: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Distribution.model_validate(raw)
