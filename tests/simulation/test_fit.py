from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.fit import distance, draws, fit, fit_delays

DELAYS = {
    "exponential": Distribution(distribution="exponential", ms=200, plus_ms=60),
    "lognormal": Distribution(distribution="lognormal", ms=150, shape=0.4),
    "pareto": Distribution(distribution="pareto", ms=80, shape=1.5),
    "constant": Distribution(ms=100),
}


def workers(
    count: int = 4,
    tasks: int = 10_000,
    *,
    share: float = 0.02,
    delay: Distribution | None = None,
    factor: float = 1.0,
) -> list[np.ndarray]:
    """Return what tasks of around 40 ms took; the last worker has a factor."""
    generator = np.random.default_rng(3)
    found = []
    for _ in range(count):
        times = 40 * np.exp(0.1 * generator.standard_normal(tasks))
        hit = generator.random(tasks) < (share if delay is not None else 0.0)
        if delay is not None:
            times[hit] += 1000 * delay.draw(generator, int(hit.sum()))
        found.append(times)
    found[-1] *= factor
    return found


@pytest.mark.parametrize("kind", DELAYS)
def test_delays_are_found_again(kind: str) -> None:
    given = DELAYS[kind]
    fitted = fit(workers(delay=given))
    (straggler,) = fitted.stragglers
    assert (straggler.kind, straggler.worker) == ("slow", None)
    assert straggler.probability == pytest.approx(0.02, rel=0.1)
    found = straggler.delay
    assert found is not None
    assert found.distribution == kind
    assert found.ms == pytest.approx(given.ms, rel=0.2)
    if kind in ("lognormal", "pareto"):
        assert found.shape == pytest.approx(given.shape, rel=0.2)
    assert fitted.service.mean_ms == pytest.approx(40.2, rel=0.01)
    assert distance(fitted.times, draws(fitted)) < 0.01


@pytest.mark.parametrize("kind", ["exponential", "lognormal", "pareto"])
def test_what_is_drawn_has_the_tail_of_the_law(kind: str) -> None:
    """And not that of the sample, which holds forty of the slowest thousandth."""
    fitted = fit(workers(delay=DELAYS[kind]))
    drawn = np.sort(draws(fitted, 400_000))
    law = np.sort(np.concatenate(workers(4, 100_000, delay=DELAYS[kind])))
    for share in (0.5, 0.9, 0.99, 0.995, 0.999):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(law, share), rel=0.1)
    assert drawn.max() > fitted.times.max()


def test_a_slow_worker_and_a_fast_one_are_told_from_delays() -> None:
    slow = fit(workers(factor=3.0, delay=DELAYS["pareto"]))
    assert [(s.kind, s.worker) for s in slow.stragglers] == [("factor", 3), ("slow", None)]
    assert slow.stragglers[0].factor == pytest.approx(3, rel=0.02)
    assert slow.stragglers[1].probability == pytest.approx(0.02, rel=0.15)
    assert slow.service.mean_ms == pytest.approx(40.2, rel=0.01)
    (fast,) = fit(workers(factor=0.5)).stragglers
    assert (fast.kind, fast.worker) == ("factor", 3)
    assert fast.factor == pytest.approx(0.5, rel=0.02)


def test_workers_that_differ_by_a_little_or_did_little_have_no_factor() -> None:
    assert fit(workers(factor=1.2)).stragglers == ()
    few = [*workers(), 40 * np.full(20, 3.0)]  # of a worker that was just started
    assert not any(s.kind == "factor" for s in fit(few).stragglers)


def test_too_few_stragglers_are_kept_as_measured() -> None:
    times = workers(1, 1000)[0]
    times[:19] = 500.0
    fitted = fit([times])
    assert fitted.stragglers == ()
    assert draws(fitted).max() == pytest.approx(500)
    times[:20] = 500.0
    assert len(fit([times]).stragglers) == 1


def test_no_stragglers_and_nothing_but_one_time() -> None:
    assert fit(workers()).stragglers == ()
    alike = fit([np.full(200, 7.0)])
    assert alike.service.mean_ms == pytest.approx(7)
    assert not alike.stragglers
    nothing = fit([np.zeros(200)])
    assert nothing.service.mean_ms == 0
    assert not nothing.stragglers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=20, max_size=60))
def test_any_delays_are_fitted_by_a_law(values: list[float]) -> None:
    found = fit_delays(np.array(values))
    drawn = found.draw(np.random.default_rng(0), 100)
    assert np.all(drawn >= 0)
    assert not np.isnan(drawn).any()


def test_distance_of_samples() -> None:
    assert distance(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 9.0, 9.0])) == 0.5
    assert distance(np.array([1.0]), np.array([2.0])) == 1
