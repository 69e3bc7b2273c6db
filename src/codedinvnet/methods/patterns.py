"""Which workers of a group are missing."""

from __future__ import annotations

import math
from itertools import combinations

import torch


def erasure_patterns(workers: int, missing: int, limit: int, seed: int) -> list[tuple[int, ...]]:
    """Return sets of missing workers: all, or a sample of `limit` distinct ones.

    Args:
        workers: how many a group has.
        missing: how many of them are missing.
        limit: the most that are wanted.
        seed: of the sample.
    """
    if math.comb(workers, missing) <= limit:
        return list(combinations(range(workers), missing))
    generator = torch.Generator().manual_seed(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < limit:
        drawn = torch.randperm(workers, generator=generator)[:missing]
        found.add(tuple(sorted(drawn.tolist())))
    return sorted(found)
