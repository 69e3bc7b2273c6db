"""The rules of codes: their tasks, what outputs determine, and what a task costs.

No torch, no I/O, no clock. The scheduler, the simulator and the planner ask one and the same
object, so that a code is served as it is simulated.

A group of `size` queries (its *members*, numbered from 0) becomes tasks. Tasks 0 to size − 1 belong
to the members, tasks k to k + r − 1 are extra, whatever the size. A task says which members it
needs, which model computes it, and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

SERVED, BACKUP, PARITY_MODEL = "served", "backup", "parity"
"""Roles of models: the served one, a small backup, and a model that was trained for parities."""
SMALL_BACKUP = "small-backup"
"""The name of the method whose extra task is a small backup's; a gateway has it without a code."""


class Task(NamedTuple):
    """One task of a group."""

    members: tuple[int, ...]
    """The members whose queries the task needs."""
    model: str = SERVED
    """The role of the model that computes the task."""
    cost: float = 1.0
    """The model's work, in services of one query by the served model; encoding is not in it."""
    encoded: bool = False
    """Whether `Code.encode` makes one query of the members; else the model takes them as they are,
    in one batch."""


class CodeRules(Protocol):
    """What the scheduler, the simulator and the planner need to know of a code."""

    @property
    def k(self) -> int:
        """The most queries in a group."""

    @property
    def r(self) -> int:
        """The number of extra tasks of a full group."""

    @property
    def fixed_size(self) -> bool:
        """Whether groups must have exactly k members; otherwise 1 to k are served."""

    @property
    def guesses(self) -> bool:
        """Whether an extra task's output alone gives some answer for every member.

        A guess is worse than the answer of a member that is determined: servers ask last for it.
        """

    def tasks(self, size: int) -> Mapping[int, Task]:
        """Return the tasks of a group by their numbers.

        Raises:
            ValueError: if the code has no groups of that size.
        """

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members of a group of `size` that the outputs of these tasks determine."""


@dataclass(frozen=True)
class Costs:
    """What an extra task costs, in services of one query by the served model."""

    group: float = 0.0
    """The part that does not depend on the group's size."""
    member: float = 0.0
    """The part that each member adds."""

    def __call__(self, size: int) -> float:
        """Return the cost of a group of that size."""
        return self.group + self.member * size


def is_systematic(rules: CodeRules) -> bool:
    """Tell whether data tasks need their own member alone, so that they can leave at once."""
    tasks = rules.tasks(rules.k)
    return all(tasks[i].members == (i,) and not tasks[i].encoded for i in range(rules.k))


@dataclass(frozen=True)
class Uncoded:
    """No code: a missing answer stays missing.

    Attributes:
        k: the most queries in a group.
    """

    k: int = 1
    r = 0
    fixed_size = False
    guesses = False

    def tasks(self, size: int) -> Mapping[int, Task]:
        """Return one task for each member."""
        return _tasks(self.k, 0, size, False, SERVED, 1.0, False)

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered."""
        return _here(available, size)


@dataclass(frozen=True)
class Replicated:
    """Each member on two workers: task k + i is the copy of task i.

    Attributes:
        k: the most queries in a group.
    """

    k: int
    fixed_size = False
    guesses = False

    @property
    def r(self) -> int:
        """The number of copies in a full group."""
        return self.k

    def tasks(self, size: int) -> Mapping[int, Task]:
        """Return two tasks for each member."""
        data = _tasks(self.k, 0, size, False, SERVED, 1.0, False)
        return {**data, **{self.k + i: task for i, task in data.items()}}

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members of which one of two answered."""
        return frozenset(i for i in range(size) if i in available or self.k + i in available)


@dataclass(frozen=True)
class Parities:
    """Parity tasks over all members, each of which makes up for one missing member.

    Attributes:
        k: the most queries in a group.
        r: parity tasks.
        fixed_size: whether groups have exactly k members.
        guesses: see `CodeRules`.
        model: the role that computes a parity.
        cost: the model's work on a parity of a group of that size; None: that of one query.
    """

    k: int
    r: int = 1
    fixed_size: bool = False
    guesses: bool = False
    model: str = SERVED
    cost: Callable[[int], float] | None = None

    def tasks(self, size: int) -> Mapping[int, Task]:
        """Return a data task for each member, and r parities from task k on over all of them."""
        cost = 1.0 if self.cost is None else self.cost(size)
        return _tasks(self.k, self.r, size, self.fixed_size, self.model, cost, True)

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered, or all if no more are missing than parities here."""
        if len(available) >= size:
            return _everyone(size)
        return _here(available, size)


@dataclass(frozen=True)
class AnswersAll:
    """Extra tasks whose output answers for each of their members by itself.

    A small backup is one: it takes the members as they are and costs 1/k for each. A backup that
    costs more is shared by r tasks: task k + j is over the members j, j + r, j + 2r and so on.

    Attributes:
        k: the most queries in a group.
        model: the role that computes the extra tasks.
        cost: the model's work on an extra task over so many members; None: a k-th of each.
        r: extra tasks of a full group; a group of fewer members has no more than those.
    """

    k: int
    model: str = BACKUP
    cost: Callable[[int], float] | None = None
    r: int = 1
    fixed_size = False
    guesses = False

    def tasks(self, size: int) -> Mapping[int, Task]:
        """Return a data task for each member, and the extra tasks over their shares."""
        return _shares(self, size)

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered, and those whose extra task did."""
        if self.r == 1:
            return _everyone(size) if self.k in available else _here(available, size)
        extra = {i for i in range(size) if self.k + i % self.r in available}
        return _here(available, size) | extra


@dataclass(frozen=True)
class AnyOf:
    """A code in which every task is encoded of all members, and any `needed` outputs answer all.

    Attributes:
        k: queries in a group.
        workers: tasks of a group.
        needed: outputs that determine the members.
    """

    k: int
    workers: int
    needed: int
    fixed_size = True
    guesses = False

    @property
    def r(self) -> int:
        """The number of tasks beyond k."""
        return self.workers - self.k

    def tasks(self, size: int) -> Mapping[int, Task]:
        """Return the tasks, all of which need everybody."""
        return _all_of_all(self, size)

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return all members if enough outputs are here, else none."""
        enough = sum(task < self.workers for task in available) >= self.needed
        return _everyone(size) if enough else frozenset()


def check_size(k: int, size: int, fixed: bool) -> None:
    """Raise ValueError if a code has no groups of a size."""
    if not (k if fixed else 1) <= size <= k:
        served = f"{k}" if fixed else f"1 to {k}"
        raise ValueError(f"a group has {served} members, got {size}")


@cache
def _tasks(
    k: int, r: int, size: int, fixed: bool, model: str, cost: float, encoded: bool
) -> Mapping[int, Task]:
    check_size(k, size, fixed)
    extra = Task(tuple(range(size)), model, cost, encoded)
    return {**{i: Task((i,)) for i in range(size)}, **{k + j: extra for j in range(r)}}


@cache
def _shares(rules: AnswersAll, size: int) -> Mapping[int, Task]:
    check_size(rules.k, size, fixed=False)
    found = {i: Task((i,)) for i in range(size)}
    for number in range(min(rules.r, size)):
        members = tuple(range(number, size, rules.r))
        count = len(members)
        cost = count / rules.k if rules.cost is None else rules.cost(count)
        found[rules.k + number] = Task(members, rules.model, cost)
    return found


@cache
def _all_of_all(rules: AnyOf, size: int) -> Mapping[int, Task]:
    check_size(rules.k, size, fixed=True)
    return dict.fromkeys(range(rules.workers), Task(tuple(range(size)), encoded=True))


def _here(available: frozenset[int], size: int) -> frozenset[int]:
    return frozenset(task for task in available if task < size)


@cache
def _everyone(size: int) -> frozenset[int]:
    return frozenset(range(size))
