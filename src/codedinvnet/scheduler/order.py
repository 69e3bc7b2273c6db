"""Which worker comes first: a heap of their keys, so that a choice need not look at all of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TypeAlias

Key: TypeAlias = tuple[float, int, float]
"""The smallest comes first."""
SLACK = 4
"""The heap is rebuilt when it holds so many times as many entries as there are workers: rarely, so
that rebuilding costs less than the pushes before it."""


class WorkerOrder:
    """Workers by key; a new key costs O(log n), the first worker O(log n) amortised.

    Entries of the heap are not moved when a key changes: a new one is pushed, and an old one is
    thrown away when it comes to the top.

    Args:
        size: how many workers there are, numbered from 0; none has a key yet.
    """

    def __init__(self, size: int) -> None:
        self._keys: list[Key | None] = [None] * size
        self._heap: list[tuple[Key, int]] = []

    def update(self, worker: int, key: Key | None) -> None:
        """Give a worker a key; with None it is not to be chosen."""
        if key == self._keys[worker]:
            return
        self._keys[worker] = key
        if key is None:
            return
        heapq.heappush(self._heap, (key, worker))
        if len(self._heap) > SLACK * len(self._keys) + SLACK:
            self._heap = [(k, i) for i, k in enumerate(self._keys) if k is not None]
            heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[int]:
        """Yield the workers that have a key, the smallest first; each costs O(log n)."""
        heap, keys = self._heap, self._keys
        passed: list[tuple[Key, int]] = []
        try:
            while heap:
                key, worker = entry = heapq.heappop(heap)
                if keys[worker] == key and passed[-1:] != [entry]:
                    passed.append(entry)
                    yield worker
        finally:
            if self._heap:
                for entry in passed:
                    heapq.heappush(self._heap, entry)
            else:
                self._heap = passed  # sorted, which is a heap
