"""Service times and stragglers of a scenario, fitted to what tasks really took.

A task's time is that of an ordinary one, times a factor of its worker's, and now and then a delay
beside. What is at most twice the median is ordinary and kept as measured; what is beyond is a
straggler, whose delay gets the one of three distributions that makes the measured ones likeliest.
A sample of ten thousand holds ten of the slowest thousandth, so the delays' tail is drawn from a
law and not from them.

Nothing is said of when tasks were late: delays that come together (bursts) are fitted as if each
came alone, and tasks that never ended are in no sample.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from codedinvnet.quantiles import SHARES, quantiles
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.scenario import Straggler
from codedinvnet.simulation.task_times import FEWEST_TASKS, SAMPLE

ORDINARY = 2.0
"""A task that takes more medians than this is a straggler."""
UNLIKE = 1.25
"""A worker whose median is so many times the others', or as many times less, has a factor."""
FEWEST_DELAYS = 20
"""Fewer stragglers are kept as measured, among the ordinary tasks."""
NARROW = 0.1
"""Delays whose standard deviation is at most so much of their mean are one constant."""
BLURRED = 0.1
"""Share of the delays, from the shortest, that does not tell where a law begins."""


@dataclass(frozen=True)
class Fitted:
    """What a scenario needs.

    Attributes:
        service: of ordinary tasks, without a worker's factor.
        stragglers: factors of workers, then delays.
        times: the sample (n,) that was fitted, in ms, of all workers alike (over their factors).
    """

    service: Distribution
    stragglers: tuple[Straggler, ...]
    times: np.ndarray


def fit(workers: Sequence[np.ndarray]) -> Fitted:
    """Fit service times and stragglers.

    Args:
        workers: of each what its tasks took, (n,) in ms; at least FEWEST_TASKS in all.
    """
    factors = _factors(workers)
    times = np.concatenate(
        [sample / factors.get(worker, 1.0) for worker, sample in enumerate(workers)]
    )
    slower = [
        Straggler(kind="factor", worker=worker, factor=round(factor, 3))
        for worker, factor in factors.items()
    ]
    median = float(np.median(times))
    late = times > ORDINARY * median
    if late.sum() < FEWEST_DELAYS:
        return Fitted(_empirical(times), tuple(slower), times)
    delayed = Straggler(
        kind="slow", probability=float(late.mean()), delay=fit_delays(times[late] - median)
    )
    return Fitted(_empirical(times[~late]), (*slower, delayed), times)


def _empirical(times: np.ndarray) -> Distribution:
    return Distribution(
        distribution="empirical", values_ms=tuple(quantiles(times, digits=4)), shares=SHARES
    )


def _factors(workers: Sequence[np.ndarray]) -> dict[int, float]:
    """Return worker -> how many times slower (or faster) than the others it is, if it is."""
    medians = {
        worker: float(np.median(sample))
        for worker, sample in enumerate(workers)
        if len(sample) >= FEWEST_TASKS
    }
    if not medians or not (usual := statistics.median_low(medians.values())):
        return {}
    found = {worker: median / usual for worker, median in medians.items()}
    return {w: f for w, f in found.items() if f > UNLIKE or 0 < f < 1 / UNLIKE}


def fit_delays(delays: np.ndarray) -> Distribution:
    """Return the likeliest of an exponential, a lognormal and a Pareto distribution, or a constant.

    Tasks would not have taken the same without their delays, which blurs where these begin. So laws
    with a beginning are fitted by maximum likelihood to the delays beyond the BLURRED shortest
    (of a Pareto tail: Hill, 1975), and the likelihoods of these are compared.

    Args:
        delays: (n,) in ms, above 0.
    """
    mean, deviation = float(delays.mean()), float(delays.std())
    start = float(np.quantile(delays, BLURRED))
    beyond = delays[delays > start]
    if deviation <= NARROW * mean or len(beyond) == 0:
        return Distribution(ms=round(mean, 4))
    n, logs = len(beyond), np.log(beyond)
    middle, spread = float(np.log(delays).mean()), float(np.log(delays).std())
    further = float(beyond.mean()) - start
    exponent = 1 / (float(logs.mean()) - math.log(start))
    density = norm.logpdf(logs, middle, spread) - logs
    likelihoods = {
        "exponential": -n * (math.log(further) + 1),
        "lognormal": float(density.sum()) - n * norm.logsf(math.log(start), middle, spread),
        "pareto": n * (math.log(exponent) + exponent * math.log(start))
        - (exponent + 1) * float(logs.sum()),
    }
    likeliest = max(likelihoods, key=likelihoods.__getitem__)
    if likeliest == "lognormal":
        return Distribution(
            distribution="lognormal", ms=round(math.exp(middle), 4), shape=round(spread, 4)
        )
    unseen = math.log(1 - BLURRED)  # back from `start` to where the law begins
    if likeliest == "exponential":
        least = max(0.0, start + further * unseen)
        return Distribution(
            distribution="exponential", ms=round(further, 4), plus_ms=round(least, 4)
        )
    least = start * math.exp(unseen / exponent)
    return Distribution(distribution="pareto", ms=round(least, 4), shape=round(exponent, 4))


def draws(fitted: Fitted, count: int = SAMPLE, seed: int = 0) -> np.ndarray:
    """Return times (count,) in ms as the simulator draws them, of a worker without a factor."""
    generator = np.random.default_rng(seed)
    times = fitted.service.draw(generator, count)
    for straggler in fitted.stragglers:
        if straggler.delay is not None:
            hit = generator.random(count) < straggler.probability
            times[hit] += straggler.delay.draw(generator, int(hit.sum()))
    return 1000 * times


def distance(measured: np.ndarray, drawn: np.ndarray) -> float:
    """Return the largest difference of two samples' distribution functions (Kolmogorov-Smirnov)."""
    measured, drawn = np.sort(measured), np.sort(drawn)
    at = np.concatenate([measured, drawn])
    shares = [np.searchsorted(x, at, side="right") / len(x) for x in (measured, drawn)]
    return float(np.abs(shares[0] - shares[1]).max())
