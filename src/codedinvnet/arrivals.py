"""Poisson arrivals that a seed repeats: of the load generator, and of the simulator behind it."""

from __future__ import annotations

import random


def poisson_gaps(rate: float, count: int, seed: int) -> list[float]:
    """Return the gaps in seconds before each of `count` requests.

    Args:
        rate: requests a second.
        count: how many.
        seed: of Python's `random.Random`.
    """
    generator = random.Random(seed)
    return [generator.expovariate(rate) for _ in range(count)]
