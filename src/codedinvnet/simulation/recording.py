"""A latency log of tasks, and the scenario that repeats it.

A task takes an ordinary time, multiplied by its worker's factor, and now and then a delay. Times up
to twice the median are ordinary and kept as measured. The delays of all others get the likelier of
an exponential and a Pareto law: a log holds only a few of the rarest delays, so the tail is drawn
from a law and not from them.

A log does not say when tasks were late, so delays that come together (bursts) are repeated one by
one. A delay is taken to be the worker's, so that a copy of a late task has its own draw; where
inputs are slow themselves, a copy would not help. Waiting that is in the times is simulated again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import SHARES, quantiles
from codedinvnet.simulation.distributions import Distribution
from codedinvnet.simulation.stragglers import Straggler

HEADER = "worker,ms"
FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to tell whether it is slower than the others."""
LONGEST = 86_400_000.0
"""Of a task, in ms."""
ORDINARY = 2.0
"""A task that takes more medians than this was delayed."""
LOW = 0.2
"""Share of a worker's tasks that are surely ordinary: the longest of them is compared."""
UNLIKE = 1.25
"""A worker whose tasks take so many times as long, or as many times less, has a factor."""
CHANCE = 1e-3
"""A worker with few tasks is slow if all workers together show one like it less often than this."""
WORSE = 3.0
"""A worker that is late so many times as often as the others has a straggler of its own."""
FEWEST_DELAYS = 20
"""Fewer delays get no law: those measured are drawn."""
NARROW = 0.1
"""Delays whose standard deviation is at most so much of their mean are one constant."""
BLURRED = 0.1
"""Share of the delays, from the shortest, that does not tell where a law begins."""


class WorkerTasks(NamedTuple):
    """A worker's tasks: what they took, (n,) in ms."""

    name: str
    times: np.ndarray


def read_log(path: Path) -> list[WorkerTasks]:
    """Read a latency log: a CSV file with a line `worker,ms` for every task.

    Raises:
        UserError: if the file is no such log, or holds too few tasks.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    samples: dict[str, list[float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.replace(" ", "") == HEADER):
            continue
        worker, comma, text = line.partition(",")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not comma or not 0 <= value <= LONGEST:
            raise UserError(f"{path}, line {number}: {line!r} is not {HEADER} (from 0 ms to a day)")
        samples.setdefault(worker.strip(), []).append(value)
    count = sum(map(len, samples.values()))
    if count < FEWEST_TASKS:
        raise UserError(f"{path}: {count} tasks are too few to fit: {FEWEST_TASKS} at least")
    if not statistics.median(ms for times in samples.values() for ms in times):
        raise UserError(f"{path}: more than half of the tasks took 0 ms; times are in ms")
    return [WorkerTasks(name, np.array(times)) for name, times in samples.items()]


@dataclass(frozen=True)
class Fitted:
    """What a scenario needs.

    Attributes:
        service: of ordinary tasks, without a worker's factor.
        stragglers: factors of workers, then delays of single workers, then everybody's.
        workers: their names, by the numbers that the stragglers have: the peculiar ones first.
        shares: of the tasks that each did, (workers,).
        times: of all tasks, (n,) in ms.
    """

    service: Distribution
    stragglers: tuple[Straggler, ...]
    workers: tuple[str, ...]
    shares: np.ndarray
    times: np.ndarray

    def draw(self, count: int = 100_000) -> np.ndarray:
        """Draw the times of about so many tasks of all workers as the simulator does, in ms."""
        generator, found = np.random.default_rng(0), []
        for number, share in enumerate(self.shares):
            times = 1000 * self.service.draw(generator, round(count * float(share)))
            own = [s for s in self.stragglers if s.worker in (None, number)]
            times *= math.prod(s.factor or 1.0 for s in own)
            for straggler in own:
                if straggler.delay is not None:
                    hit = generator.random(len(times)) < straggler.probability
                    times[hit] += 1000 * straggler.delay.draw(generator, int(hit.sum()))
            found.append(times)
        return np.concatenate(found)


class _Worker(NamedTuple):
    """A worker's tasks, split into ordinary and late ones."""

    name: str
    times: np.ndarray
    factor: float
    late: np.ndarray
    """(n,) bool."""
    median: float
    """Of an ordinary task, over the factor."""

    @property
    def delays(self) -> np.ndarray:
        """Of the late tasks, (m,)."""
        found: np.ndarray = self.times[self.late] - self.factor * self.median
        return found

    @property
    def late_share(self) -> float:
        return float(self.late.mean())


def fit(workers: Sequence[WorkerTasks]) -> Fitted:
    """Fit service times and stragglers to a log."""
    split = _split(workers)
    usual = statistics.median_low(worker.late_share for worker in split)
    own = {
        place
        for place, worker in enumerate(split)
        if worker.late.sum() >= FEWEST_DELAYS
        and worker.late_share > WORSE * max(usual, 1 / len(worker.late))
    }
    odd = {place for place, worker in enumerate(split) if worker.factor != 1} | own
    order = sorted(range(len(split)), key=lambda place: (place not in odd, place))
    numbers = {place: number for number, place in enumerate(order)}
    stragglers = [
        Straggler(kind="factor", worker=numbers[place], factor=float(f"{split[place].factor:.4g}"))
        for place in sorted(odd)
        if split[place].factor != 1
    ]
    # On a slow worker short delays pass for ordinary times: the others tell more, if there are any.
    plain = [worker for worker in split if worker.factor == 1] or split
    others = [worker for place, worker in enumerate(split) if place not in own]
    common = [worker for worker in others if worker.factor == 1]
    enough = sum(worker.late.sum() for worker in common) >= FEWEST_DELAYS
    everybodys = _delayed(common if enough else others, None)
    besides = everybodys[0].probability if everybodys else 0.0
    for place in sorted(own):
        stragglers += _delayed([split[place]], numbers[place], besides)
    ordinary = np.concatenate([w.times[~w.late] / w.factor for w in plain])
    done = np.array([len(split[place].late) for place in order], dtype=float)
    return Fitted(
        _as_measured(ordinary),
        (*stragglers, *everybodys),
        tuple(split[place].name for place in order),
        done / done.sum(),
        np.concatenate([worker.times for worker in split]),
    )


def _split(workers: Sequence[WorkerTasks]) -> list[_Worker]:
    """Find every worker's factor and which of its tasks are late."""

    def own(worker: WorkerTasks) -> float:  # of an ordinary task, even if most are late
        return float(np.quantile(worker.times, LOW))

    known = [worker for worker in workers if len(worker.times) >= FEWEST_TASKS] or workers
    usual = statistics.median_low(map(own, known))
    late = np.concatenate([worker.times for worker in known]) > ORDINARY * usual
    factors = []
    for worker in workers:
        ratio = own(worker) / usual if usual else 1.0
        if len(worker.times) >= FEWEST_TASKS:
            unlike = ratio > UNLIKE or 0 < ratio < 1 / UNLIKE
        else:  # a service avoids slow workers, so these have few tasks to show
            count, share = int((worker.times > ORDINARY * usual).sum()), float(late.mean())
            chance = binom.sf(count - 1, len(worker.times), max(share, 1 / len(late)))
            unlike = ratio > ORDINARY and chance * len(workers) < CHANCE
        factors.append(ratio if unlike else 1.0)
    alike = [worker.times / factor for worker, factor in zip(workers, factors, strict=True)]
    median = float(np.median(np.concatenate(alike)))
    return [
        _Worker(*worker, factor, times > ORDINARY * median, median)
        for worker, factor, times in zip(workers, factors, alike, strict=True)
    ]


def _delayed(
    workers: Sequence[_Worker], number: int | None, besides: float = 0.0
) -> list[Straggler]:
    """Return the straggler that delays these workers' tasks, if any does.

    Args:
        workers: whose tasks are looked at.
        number: the straggler's worker.
        besides: share of the tasks that another straggler delays.
    """
    late = np.concatenate([worker.late for worker in workers] or [np.zeros(0, bool)])
    if not late.any():
        return []
    law, shown = fit_delays(np.concatenate([worker.delays for worker in workers]))
    share = min(1.0, float(late.mean()) / shown - besides)
    if share <= 0:  # the other straggler accounts for all of them
        return []
    return [Straggler(kind="slow", worker=number, probability=share, delay=law)]


def fit_delays(delays: np.ndarray) -> tuple[Distribution, float]:
    """Return the likelier of an exponential and a Pareto law, or a constant.

    Tasks would not have taken the same without their delays, which blurs where these begin, and
    shorter delays pass for ordinary times. So the laws are fitted by maximum likelihood to the
    delays beyond the BLURRED shortest (of a Pareto tail: Hill, 1975).

    Args:
        delays: (n,) in ms, above 0.

    Returns:
        The law, and by what the delays' share of the tasks must be divided for its probability.
    """
    mean = float(delays.mean())
    start = float(np.quantile(delays, BLURRED))
    beyond = delays[delays > start]
    if len(delays) >= FEWEST_DELAYS and delays.std() <= NARROW * mean:
        return Distribution(ms=round(mean, 4)), 1.0
    if len(delays) < FEWEST_DELAYS or len(beyond) < FEWEST_DELAYS / 2 or np.ptp(beyond) == 0:
        return _as_measured(delays), 1.0
    n, logs, at = len(beyond), np.log(beyond), math.log(start)
    unseen = math.log(n / len(delays))  # back from `start` to where the law begins
    further = float(beyond.mean()) - start
    exponent = 1 / (float(logs.mean()) - at)
    exponential = -n * (math.log(further) + 1)
    pareto = n * (math.log(exponent) + exponent * at) - (exponent + 1) * float(logs.sum())
    if exponential > pareto:
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
