"""The fault injector of a simulation: what stragglers do to each call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from codedinvnet.common.distributions import Distribution, uniforms
from codedinvnet.common.faults import Fault


@dataclass(frozen=True)
class Effect:
    """What happens to one call in addition to its computing. Times are in seconds."""

    factor: float = 1.0
    blocked: float = 0.0
    held: float = 0.0
    hangs: bool = False
    crashes: bool = False


class Source:
    """One straggler with its own draws, so that other stragglers do not change what it does."""

    def __init__(self, straggler: Fault, seed: np.random.SeedSequence) -> None:
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
        """Draws the workers that a burst slows."""
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


class FaultInjector:
    """Draws what a scenario's stragglers do to calls."""

    def __init__(
        self, stragglers: Sequence[Fault], workers: int, seed: np.random.SeedSequence
    ) -> None:
        sources = [
            Source(straggler, own)
            for straggler, own in zip(stragglers, seed.spawn(len(stragglers)), strict=True)
        ]
        self.bursts = [source for source in sources if source.straggler.kind == "burst"]
        self._by_request = [source for source in sources if source.straggler.per_request]
        self._by_task = [source for source in sources if not source.straggler.per_request]
        self._pending: dict[int, list[Source]] = {}
        """Query -> what hits the first sending of its data task."""
        self._workers = workers

    def arrive(self, numbers: Sequence[int]) -> None:
        """Draw which query of a new request will be hit."""
        for source in self._by_request:
            if next(source.chance) < source.straggler.probability:
                target = numbers[int(next(source.chance) * len(numbers))]
                self._pending.setdefault(target, []).append(source)

    def begin(self, burst: Source, now: float) -> None:
        """Begin a burst on newly drawn workers, if its window is open."""
        straggler = burst.straggler
        if straggler.hits(straggler.worker or 0, now):
            count = straggler.workers or 0
            chosen = burst.workers.choice(self._workers, count, replace=False)
            burst.slowed, burst.until = frozenset(chosen.tolist()), now + next(burst.delays)

    def effect(self, worker: int, queries: Sequence[int], now: float) -> Effect | None:
        """Return what happens to a call that a worker begins; None if nothing does.

        A fault that hits several of the call's queries hits the call once.
        """
        hit = [source for source in self._by_task if source.strikes(worker, now)]
        for query in queries:
            for source in self._pending.pop(query, ()):
                if source not in hit and source.straggler.hits(worker, now):
                    hit.append(source)
        if not hit:
            return None
        factor, blocked, held = 1.0, 0.0, 0.0
        for source in hit:
            factor *= source.straggler.factor or 1.0
            if source.straggler.kind == "slow":
                blocked += next(source.delays)
            elif source.straggler.kind == "hold":
                held += next(source.delays)
        kinds = {source.straggler.kind for source in hit}
        return Effect(factor, blocked, held, "hang" in kinds, "crash" in kinds)
