"""Coding methods without their networks: what the serving rules ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class ErasureCode:
    """Any m outputs of a group of m determine all of it; a member's own output determines itself.

    Satisfies `serving.group.Code`. With r = 1 it is what Coded-InvNet and ParM can do.
    """

    k: int
    r: int = 1
    fixed_size: bool = False
    guesses: bool = False

    def tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return a data task for each member, and r parities from task k on over all of them."""
        return _tasks(self.k, self.r, size)

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered, or all if no more are missing than parities here."""
        return _recoverable(available, size)


@dataclass(frozen=True)
class Backup:
    """A small classifier in place of a parity: its one task answers for every member.

    Satisfies `serving.group.Code`, as `methods.SmallBackup` does, and `methods.CodedInvNet` with an
    encoder that keeps the members apart.
    """

    k: int
    r: int = 1
    fixed_size: bool = False
    guesses: bool = False

    def tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return a data task for each member, and task k over all of them."""
        return _tasks(self.k, 1, size)

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered, or all once task k is here."""
        return _everyone(size) if self.k in available else available


@cache
def _tasks(k: int, r: int, size: int) -> Mapping[int, tuple[int, ...]]:
    if not 1 <= size <= k:
        raise ValueError(f"a group has 1 to {k} members, got {size}")
    everyone = tuple(range(size))
    return {**{i: (i,) for i in everyone}, **{k + j: everyone for j in range(r)}}


def _recoverable(available: frozenset[int], size: int) -> frozenset[int]:
    if len(available) >= size:
        return _everyone(size)
    return frozenset(task for task in available if task < size)


@cache
def _everyone(size: int) -> frozenset[int]:
    return frozenset(range(size))
