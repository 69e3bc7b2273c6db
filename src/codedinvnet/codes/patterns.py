"""Which workers of a group are missing."""

from __future__ import annotations

import math
from itertools import combinations

import torch


def erasure_patterns(
    data: int, extra: int, missing: int, limit: int, seed: int
) -> list[tuple[int, ...]]:
    """Return sets of missing workers: all, or a sample of `limit` distinct ones.

    What can be decoded depends above all on how many extra workers are missing. As large a share of
    a sample as of all sets misses none of them, one, and so on, to within one set each.

    Args:
        data: how many workers of a group have the members' own tasks; they are numbered from 0.
        extra: how many others it has, numbered behind them.
        missing: how many of all these are missing.
        limit: the most sets that are wanted.
        seed: the seed of the sample.
    """
    total = math.comb(data + extra, missing)
    if total <= limit:
        return list(combinations(range(data + extra), missing))
    generator = torch.Generator().manual_seed(seed)
    found: set[tuple[int, ...]] = set()
    before = 0  # sets that miss fewer extra workers
    for lost in range(min(extra, missing) + 1):
        size = math.comb(data, missing - lost) * math.comb(extra, lost)
        before += size
        while len(found) < round(before * limit / total):
            own = torch.randperm(data, generator=generator)[: missing - lost]
            others = data + torch.randperm(extra, generator=generator)[:lost]
            found.add((*sorted(own.tolist()), *sorted(others.tolist())))
    return sorted(found)
