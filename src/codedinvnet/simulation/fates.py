"""What stragglers do to each task."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from codedinvnet.simulation.distributions import Distribution, uniforms
from codedinvnet.simulation.scenario import Scenario, Straggler


@dataclass(frozen=True)
class Fate:
    """What happens to one task besides its computing. Times are in seconds."""

    factor: float = 1.0
    blocked: float = 0.0
    held: float = 0.0
    hangs: bool = False
    crashes: bool = False


class Cause:
    """A straggler with draws of its own, so that others do not change what it does.

    Args:
        straggler: see there.
        seed: of its draws.
    """

    def __init__(self, straggler: Straggler, seed: np.random.SeedSequence) -> None:
        delays, chance, gaps, workers = map(np.random.default_rng, seed.spawn(4))
        self.straggler = straggler
        self.delays: Iterator[float] = itertools.repeat(0.0)
        if straggler.delay is not None:
            self.delays = straggler.delay.stream(delays)
        self.chance = uniforms(chance)
        between = Distribution(distribution="exponential", ms=1000 * (straggler.every_s or 0.0))
        self.gaps = between.stream(gaps)
        """Seconds from one burst to the next."""
        self.workers = workers
        """Draws whom a burst slows."""
        self.slowed: frozenset[int] = frozenset()
        self.until = 0.0
        """Until when the last burst slows these workers."""

    def strikes(self, worker: int, now: float) -> bool:
        """Draw whether a task that a worker begins now is hit."""
        straggler = self.straggler
        if straggler.kind == "burst":
            return worker in self.slowed and now < self.until
        if not straggler.hits(worker, now):
            return False
        return straggler.probability == 1.0 or next(self.chance) < straggler.probability


class Fates:
    """Draws what stragglers do.

    Args:
        scenario: with its stragglers.
        seed: of all draws.
    """

    def __init__(self, scenario: Scenario, seed: np.random.SeedSequence) -> None:
        stragglers = scenario.stragglers
        causes = [
            Cause(straggler, own)
            for straggler, own in zip(stragglers, seed.spawn(len(stragglers)), strict=True)
        ]
        self.bursts = [cause for cause in causes if cause.straggler.kind == "burst"]
        self._by_request = [cause for cause in causes if cause.straggler.per_request]
        self._by_task = [cause for cause in causes if not cause.straggler.per_request]
        self._doomed: dict[int, list[Cause]] = {}
        """Query -> what hits the first sending of its data task."""
        self._workers = scenario.workers

    def meet(self, numbers: Sequence[int]) -> None:
        """Draw which query of a new request is hit."""
        for cause in self._by_request:
            if next(cause.chance) < cause.straggler.probability:
                victim = numbers[int(next(cause.chance) * len(numbers))]
                self._doomed.setdefault(victim, []).append(cause)

    def begin(self, burst: Cause, now: float) -> None:
        """Begin a burst on workers drawn anew, if its time has come and is not over."""
        straggler = burst.straggler
        if straggler.hits(straggler.worker or 0, now):
            count = straggler.workers or 0
            chosen = burst.workers.choice(self._workers, count, replace=False)
            burst.slowed, burst.until = frozenset(chosen.tolist()), now + next(burst.delays)

    def of(self, worker: int, queries: Sequence[int], now: float) -> Fate | None:
        """Return what happens to a call that a worker begins; `queries`: of its data tasks.

        What hits several of them hits the call once.
        """
        hit = [cause for cause in self._by_task if cause.strikes(worker, now)]
        for query in queries:
            for cause in self._doomed.pop(query, ()):
                if cause not in hit and cause.straggler.hits(worker, now):
                    hit.append(cause)
        if not hit:
            return None
        factor, blocked, held = 1.0, 0.0, 0.0
        for cause in hit:
            factor *= cause.straggler.factor or 1.0
            if cause.straggler.kind == "slow":
                blocked += next(cause.delays)
            elif cause.straggler.kind == "hold":
                held += next(cause.delays)
        kinds = {cause.straggler.kind for cause in hit}
        return Fate(factor, blocked, held, "hang" in kinds, "crash" in kinds)
