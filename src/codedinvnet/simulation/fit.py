"""Service times and stragglers of a scenario, fitted to what tasks really took.

As the simulator has it, a task takes an ordinary time, multiplied by its worker's factor, and now
and then a delay beside. What takes at most twice the median of all tasks, each over its worker's
factor, is ordinary and kept as measured; of the rest the delays beyond the median get the one of
three laws that makes the measured ones likeliest. A sample of ten thousand holds ten of the slowest
thousandth, so the delays' tail is drawn from a law and not from them.

A service avoids slow workers, so that of these it has few tasks to show. A worker with few tasks is
slow if it would hardly be late so often by the share of late tasks that all others have.

Nothing is said of when tasks were late: delays that come together (bursts) are fitted as if each
came alone, and tasks that never ended are in no sample.

A delay is taken to be the worker's, so that a copy of a late task has a draw of its own. Where
inputs are slow themselves it would not help. Waiting that is in the times is simulated once more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.stats import binom, norm

from codedinvnet.evaluation.quantiles import SHARES, quantiles
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.scenario import Straggler
from codedinvnet.simulation.task_times import FEWEST_TASKS, WorkerTasks

ORDINARY = 2.0
"""A task that takes more medians than this is a straggler."""
LOW = 0.2
"""Share of a worker's tasks that are surely not late: by the longest of them it is compared."""
UNLIKE = 1.25
"""A worker that takes so many times as long there, or as many times less, has a factor."""
CHANCE = 1e-3
"""A worker with few tasks is slow if all workers together are less likely to show one like it."""
WORSE = 3.0
"""A worker that is late so many times as often as the others is so on its own account."""
FEWEST_DELAYS = 20
"""Fewer get no law: their delays are those measured."""
NARROW = 0.1
"""Delays whose standard deviation is at most so much of their mean are one constant."""
ALIKE = 1e-3
"""Delays whose longer ones deviate by no more of their mean get no law either."""
BLURRED = 0.1
"""Share of the delays, from the shortest, that does not tell where a law begins."""
FEWEST_SEEN = 0.1
"""A lognormal of which less lies beyond these is no fit but an extrapolation."""
DRAWS = 100_000


@dataclass(frozen=True)
class Fitted:
    """What a scenario needs.

    Attributes:
        service: of ordinary tasks, without a worker's factor.
        stragglers: factors of workers, then delays of single workers, then everybody's.
        workers: their names, by the numbers that the stragglers have: the peculiar ones first.
        shares: of the tasks that each did, (workers,).
        times: of all tasks, (n,) in ms.
        delays: (m,), those of them that are stragglers', in ms.
    """

    service: Distribution
    stragglers: tuple[Straggler, ...]
    workers: tuple[str, ...]
    shares: np.ndarray
    times: np.ndarray
    delays: np.ndarray


@dataclass(frozen=True)
class _Worker:
    """A worker's tasks, told apart."""

    tasks: WorkerTasks
    factor: float
    late: np.ndarray
    """(n,) bool."""
    median: float
    """Of an ordinary task, over the factor."""

    @property
    def delays(self) -> np.ndarray:
        """Of the late tasks, (m,)."""
        found: np.ndarray = self.tasks.times[self.late] - self.factor * self.median
        return found

    @property
    def late_share(self) -> float:
        return float(self.late.mean())


def fit(workers: Sequence[WorkerTasks]) -> Fitted:
    """Fit service times and stragglers.

    Args:
        workers: with FEWEST_TASKS tasks in all, at least.
    """
    told = _told_apart(workers)
    usual = statistics.median_low(worker.late_share for worker in told)
    own = {
        place
        for place, worker in enumerate(told)
        if worker.late.sum() >= FEWEST_DELAYS
        and worker.late_share > WORSE * max(usual, 1 / len(worker.late))
    }
    odd = {place for place, worker in enumerate(told) if worker.factor != 1} | own
    order = sorted(range(len(told)), key=lambda place: (place not in odd, place))
    numbers = {place: number for number, place in enumerate(order)}
    stragglers = [
        Straggler(kind="factor", worker=numbers[place], factor=float(f"{told[place].factor:.4g}"))
        for place in sorted(odd)
        if told[place].factor != 1
    ]
    # On a slow worker short delays pass for ordinary times: the others tell more, if there are any.
    plain = [worker for worker in told if worker.factor == 1] or told
    others = [worker for place, worker in enumerate(told) if place not in own]
    common = [worker for worker in others if worker.factor == 1]
    enough = sum(worker.late.sum() for worker in common) >= FEWEST_DELAYS
    everybodys = _delayed(common if enough else others, None)
    besides = everybodys[0].probability if everybodys else 0.0
    for place in sorted(own):
        stragglers += _delayed([told[place]], numbers[place], besides)
    stragglers += everybodys
    ordinary = np.concatenate([w.tasks.times[~w.late] / w.factor for w in plain])
    done = np.array([len(told[place].late) for place in order], dtype=float)
    return Fitted(
        _as_measured(ordinary),
        tuple(stragglers),
        tuple(told[place].tasks.name for place in order),
        done / done.sum(),
        np.concatenate([worker.tasks.times for worker in told]),
        np.concatenate([worker.delays for worker in told]),
    )


def _delayed(
    workers: Sequence[_Worker], number: int | None, besides: float = 0.0
) -> list[Straggler]:
    """Return the straggler that delays these workers' tasks, if any does.

    Args:
        workers: of which one alone has a number.
        number: the straggler's.
        besides: share of the tasks that another one delays.
    """
    late = np.concatenate([worker.late for worker in workers] or [np.zeros(0, bool)])
    if not late.any():
        return []
    law, shown = fit_delays(np.concatenate([worker.delays for worker in workers]))
    share = min(1.0, float(late.mean()) / shown - besides)
    if share <= 0:  # the other one accounts for all of them
        return []
    return [Straggler(kind="slow", worker=number, probability=share, delay=law)]


def _told_apart(workers: Sequence[WorkerTasks]) -> list[_Worker]:
    """Find every worker's factor and which of its tasks are late."""

    def own(worker: WorkerTasks) -> float:  # of an ordinary task, even if the most are late
        return float(np.quantile(worker.times, LOW))

    known = [worker for worker in workers if len(worker.times) >= FEWEST_TASKS] or workers
    usual = statistics.median_low(map(own, known))
    late = np.concatenate([worker.times for worker in known]) > ORDINARY * usual
    factors = []
    for worker in workers:
        ratio = own(worker) / usual if usual else 1.0
        if len(worker.times) >= FEWEST_TASKS:
            unlike = ratio > UNLIKE or 0 < ratio < 1 / UNLIKE
        else:
            count, share = int((worker.times > ORDINARY * usual).sum()), float(late.mean())
            chance = binom.sf(count - 1, len(worker.times), max(share, 1 / len(late)))
            unlike = ratio > ORDINARY and chance * len(workers) < CHANCE
        factors.append(ratio if unlike else 1.0)
    alike = [worker.times / factor for worker, factor in zip(workers, factors, strict=True)]
    median = float(np.median(np.concatenate(alike)))
    return [
        _Worker(worker, factor, times > ORDINARY * median, median)
        for worker, factor, times in zip(workers, factors, alike, strict=True)
    ]


def fit_delays(delays: np.ndarray) -> tuple[Distribution, float]:
    """Return the likeliest of an exponential, a lognormal and a Pareto distribution, or a constant.

    Tasks would not have taken the same without their delays, which blurs where these begin, and
    shorter ones pass for ordinary tasks. So the laws are fitted by maximum likelihood to the delays
    beyond the BLURRED shortest, given that they are beyond these (of a Pareto tail: Hill, 1975),
    and the likeliest is taken.

    Args:
        delays: (n,) in ms, above 0. Fewer than FEWEST_DELAYS, or such whose longer ones are
            ALIKE, are taken as they are.

    Returns:
        The law, and what the delays' share of the tasks is to be divided by for its probability:
        1, unless the law begins before these delays or cannot begin as early as it should.
    """
    if len(delays) < FEWEST_DELAYS:
        return _as_measured(delays), 1.0
    mean, deviation = float(delays.mean()), float(delays.std())
    start = float(np.quantile(delays, BLURRED))
    beyond = delays[delays > start]
    if deviation <= NARROW * mean:
        return Distribution(ms=round(mean, 4)), 1.0
    if len(beyond) < FEWEST_DELAYS / 2 or beyond.std() <= ALIKE * beyond.mean():
        return _as_measured(delays), 1.0
    n, logs, at = len(beyond), np.log(beyond), math.log(start)
    unseen = math.log(n / len(delays))  # back from `start` to where the law begins
    further = float(beyond.mean()) - start
    exponent = 1 / (float(logs.mean()) - at)
    middle, spread, likelihood = _lognormal(logs, at)
    seen = float(norm.sf(at, middle, spread))
    likelihoods = {
        "exponential": -n * (math.log(further) + 1),
        "lognormal": likelihood - float(logs.sum()) if seen >= FEWEST_SEEN else -math.inf,
        "pareto": n * (math.log(exponent) + exponent * at) - (exponent + 1) * float(logs.sum()),
    }
    likeliest = max(likelihoods, key=likelihoods.__getitem__)
    if likeliest == "lognormal":
        law = Distribution(
            distribution="lognormal", ms=round(math.exp(middle), 4), shape=round(spread, 4)
        )
        return law, seen * len(delays) / n
    if likeliest == "exponential":
        least = max(0.0, start + further * unseen)
        law = Distribution(
            distribution="exponential", ms=round(further, 4), plus_ms=round(least, 4)
        )
        return law, math.exp((least - start) / further) * len(delays) / n
    least = start * math.exp(unseen / exponent)
    return Distribution(distribution="pareto", ms=round(least, 4), shape=round(exponent, 4)), 1.0


def _as_measured(times: np.ndarray) -> Distribution:
    """Return times (n,) as a distribution: the values themselves, or quantiles of many."""
    if len(times) <= len(SHARES):
        values = tuple(np.sort(times).round(4).tolist())
        return Distribution(distribution="empirical", values_ms=values)
    values = tuple(quantiles(times, digits=4))
    return Distribution(distribution="empirical", values_ms=values, shares=SHARES)


def _lognormal(logs: np.ndarray, start: float) -> tuple[float, float, float]:
    """Fit a normal distribution to logarithms (n,) that are known to lie beyond `start`.

    Returns:
        Its mean, its standard deviation, and the logarithm of the likelihood.
    """

    def minus_likelihood(at: np.ndarray) -> float:
        middle, spread = at[0], math.exp(at[1])
        density = norm.logpdf(logs, middle, spread).sum()
        return float(len(logs) * norm.logsf(start, middle, spread) - density)

    first = (float(logs.mean()), math.log(float(logs.std())))
    found = minimize(minus_likelihood, first, method="Nelder-Mead")
    return float(found.x[0]), math.exp(float(found.x[1])), -float(found.fun)


def draws(fitted: Fitted, count: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Draw tasks of all workers together as the simulator does.

    Args:
        fitted: service and stragglers.
        count: of tasks, about.

    Returns:
        What they take, (n,) in ms, and the delays among that, (m,) in ms.
    """
    generator = np.random.default_rng(0)
    found, delays = [], [np.zeros(0)]
    for number, share in enumerate(fitted.shares):
        times = 1000 * fitted.service.draw(generator, round(count * float(share)))
        own = [s for s in fitted.stragglers if s.worker in (None, number)]
        times *= math.prod(s.factor or 1.0 for s in own)
        for straggler in own:
            if straggler.delay is not None:
                hit = generator.random(len(times)) < straggler.probability
                delays.append(1000 * straggler.delay.draw(generator, int(hit.sum())))
                times[hit] += delays[-1]
        found.append(times)
    return np.concatenate(found), np.concatenate(delays)
