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

from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Fault
from codedinvnet.common.quantiles import SHARES, quantiles

HEADER = "worker,ms"
FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to compare its times with the others'."""
LONGEST = 86_400_000.0
"""Of a task, in ms."""
ORDINARY = 2.0
"""A task that takes more medians than this was delayed."""
LOW = 0.2
"""Share of a worker's tasks that are surely ordinary: the longest of them is compared."""
UNLIKE = 1.25
"""A worker whose tasks take so many times as long, or as many times less, has a factor."""
FEW_TASKS = 4
"""A worker with so many, none of which is as quick as two medians, is slow: delays are rare."""
FEWEST_DELAYS = 20
"""Fewer delays get no law: those measured are drawn."""
NARROW = 0.1
"""Delays whose standard deviation is at most so much of their mean are one constant."""
BLURRED = 0.1
"""Share of the delays, from the shortest, that does not show where a law begins."""


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
        stragglers: factors of workers, then everybody's delays.
        workers: their names, by the numbers that the stragglers have: the slow ones first.
        shares: of the tasks that each did, (workers,).
        times: of all tasks, (n,) in ms.
    """

    service: Distribution
    stragglers: tuple[Fault, ...]
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


def fit(workers: Sequence[WorkerTasks]) -> Fitted:
    """Fit service times and stragglers to a log."""
    factors = _factors(workers)
    alike = [worker.times / factor for worker, factor in zip(workers, factors, strict=True)]
    median = float(np.median(np.concatenate(alike)))
    late = [times > ORDINARY * median for times in alike]
    order = sorted(range(len(workers)), key=lambda place: (factors[place] == 1, place))
    stragglers = [
        Fault(kind="factor", worker=number, factor=float(f"{factors[place]:.4g}"))
        for number, place in enumerate(order)
        if factors[place] != 1
    ]
    # On a slow worker short delays pass for ordinary times: the others show more, if they can.
    plain = [place for place in order if factors[place] == 1] or order
    if sum(late[place].sum() for place in plain) < FEWEST_DELAYS:
        plain = order
    delays = [workers[p].times[late[p]] - factors[p] * median for p in plain]
    hit = np.concatenate([late[place] for place in plain])
    if hit.any():
        law, shown = fit_delays(np.concatenate(delays))
        share = min(1.0, float(hit.mean()) / shown)
        stragglers.append(Fault(kind="slow", probability=share, delay=law))
    done = np.array([len(workers[place].times) for place in order], dtype=float)
    return Fitted(
        _as_measured(np.concatenate([alike[place][~late[place]] for place in plain])),
        tuple(stragglers),
        tuple(workers[place].name for place in order),
        done / done.sum(),
        np.concatenate([worker.times for worker in workers]),
    )


def _factors(workers: Sequence[WorkerTasks]) -> list[float]:
    """Return how many times as long as usual each worker's ordinary tasks take."""
    own = [float(np.quantile(worker.times, LOW)) for worker in workers]
    known = [
        ms for ms, worker in zip(own, workers, strict=True) if len(worker.times) >= FEWEST_TASKS
    ]
    usual = statistics.median_low(known or own)
    factors = []
    for ms, worker in zip(own, workers, strict=True):
        ratio = ms / usual if usual else 1.0
        unlike = ratio > UNLIKE or 0 < ratio < 1 / UNLIKE
        if len(worker.times) < FEWEST_TASKS:  # a service avoids slow workers: even their quickest
            unlike = len(worker.times) >= FEW_TASKS and min(worker.times) > ORDINARY * usual
        factors.append(ratio if unlike else 1.0)
    return factors


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
