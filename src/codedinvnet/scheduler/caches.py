"""What each worker has computed of the beginnings of queries, and keeps.

Servers of language models cache what they computed for a prompt; one that begins alike costs them
only what is new. A beginning is a chain of keys, each with the bytes up to its end: hashes of a
prompt's first blocks, or one key for a whole session.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from typing import NamedTuple


class Prompt(NamedTuple):
    """What a query begins with."""

    keys: tuple[tuple[int, int], ...]
    """Of longer and longer beginnings, each with its bytes."""
    size: int
    """Bytes of all of it."""


class Caches:
    """The beginnings that workers have computed, as far as is known.

    Args:
        workers: how many there are.
        most: keys that are remembered of each.
    """

    def __init__(self, workers: int, most: int) -> None:
        self._most = most
        self._known = [OrderedDict[int, int]() for _ in range(workers)]

    def uncached(self, worker: int, prompt: Prompt) -> int:
        """Return the bytes of a prompt that a worker would have to compute."""
        known, keys = self._known[worker], prompt.keys
        count = bisect(keys, False, key=lambda one: one[0] not in known) if known else 0
        held = known[keys[count - 1][0]] if count else 0
        return max(1, prompt.size - held)

    def add(self, worker: int, prompt: Prompt) -> None:
        """Remember that a worker computes a prompt."""
        known = self._known[worker]
        is_session = len(prompt.keys) == 1
        for key, size in prompt.keys:
            known[key] = prompt.size if is_session else size
            known.move_to_end(key)
        while len(known) > self._most:
            known.popitem(last=False)

    def forget(self, worker: int, prompt: Prompt, before: int) -> None:
        """A worker did not compute a prompt after all, of which it had cached some bytes before."""
        known = self._known[worker]
        for key, size in prompt.keys:
            if size > before:
                known.pop(key, None)

    def renew(self, worker: int) -> None:
        """Forget what is known of a worker: another took its place."""
        self._known[worker].clear()
