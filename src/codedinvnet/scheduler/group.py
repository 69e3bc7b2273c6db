"""A coding group's state: which outputs are here, and which members they determine.

No I/O, no clock, no tensors: the front end and the simulator drive the same code, and a property
test drives it through every order of arrival, loss and lateness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from codedinvnet.codes.rules import CodeRules, Task, Uncoded

FILLER = -1
"""Stands for the attempt that computed a filler's output: it was known before the group began."""


class Traffic(NamedTuple):
    """What queries are like that take about as long."""

    route: str = ""
    size_class: int = 0
    """How large they are; 0 if all are alike."""
    is_prompt: bool = False
    """The size is that of what is new of a prompt, so that `Pace` knows what it takes."""


ALIKE = Traffic()


def size_class(size: int) -> int:
    """Return the size class of so many bytes: each has twice as many as the one before."""
    return size.bit_length()


class CodingGroup:
    """Consecutive queries that share parity tasks.

    A group is *open* while members may join, then *sealed*: its size is fixed and its parity tasks
    exist. Attempts are numbers that the scheduler gives to the sendings of a task; a task may be
    sent more than once.

    Args:
        identity: a number of its own.
        code: the rules of a code.
    """

    def __init__(self, identity: int, code: CodeRules) -> None:
        self.identity = identity
        self.code = code
        self.members: list[int] = []
        self.pending = 0
        """How many members have no answer yet."""
        self.size = 0
        """0 while open; then the number of members, fillers included."""
        self.tasks: Mapping[int, Task] = {}
        """The code's tasks, once the size is fixed."""
        self.outputs: dict[int, int] = {}
        """Task -> the attempt whose output is used."""
        self.live: dict[int, set[int]] = {}
        """Task -> attempts that may still answer."""
        self.at: dict[int, int] = {}
        """Worker -> how many tasks of this group it has."""
        self.has_extra = False
        """Whether the output of an extra task is here."""
        self.failed: set[int] = set()
        """Workers that failed a task of this group."""
        self.traffic = ALIKE
        """That of the largest member."""
        self.retries = 0
        """Lost parity tasks that were sent again."""

    @property
    def is_open(self) -> bool:
        """Whether queries may still join."""
        return self.size == 0

    @property
    def is_full(self) -> bool:
        """Whether k queries have joined."""
        return len(self.members) == self.code.k

    @property
    def is_complete(self) -> bool:
        """Whether the outputs of all tasks are here."""
        return self.size > 0 and len(self.outputs) == len(self.tasks)

    @property
    def is_idle(self) -> bool:
        """Whether no attempt may still answer."""
        return not any(self.live.values())

    def join(self, query: int, traffic: Traffic = ALIKE) -> int:
        """Add a query and return its member number."""
        if not self.is_open or self.is_full:
            raise ValueError(f"group {self.identity} takes no more members")
        self.members.append(query)
        self.traffic = max(self.traffic, traffic)
        self.pending += 1
        return len(self.members) - 1

    def keep(self, queries: Sequence[int]) -> None:
        """Go on with these members alone, renumbered; the others were answered without a code."""
        if not self.is_open:
            raise ValueError(f"group {self.identity} is sealed")
        live = {query: self.live.get(i, set()) for i, query in enumerate(self.members)}
        self.members = list(queries)
        self.outputs = {}
        self.live = {i: live[query] for i, query in enumerate(self.members)}

    def leave(self, query: int) -> None:
        """Take a member out of an open group; those behind it move up."""
        if not self.is_open:
            raise ValueError(f"group {self.identity} is sealed")
        left = self.members.index(query)
        del self.members[left]
        self.outputs = {m - (m > left): a for m, a in self.outputs.items() if m != left}
        self.live = {m - (m > left): a for m, a in self.live.items() if m != left}

    def uncode(self) -> None:
        """Close an open group of at most one member without a code."""
        self.code = Uncoded()
        self._fix(1)

    def seal(self) -> tuple[int, ...]:
        """Fix the size and return the tasks that have not been sent.

        A code of fixed size gets fillers behind the members; in a systematic code the fillers'
        own outputs count as arrived.
        """
        if not self.is_open or not self.members:
            raise ValueError(f"group {self.identity} cannot be sealed")
        self._fix(self.code.k if self.code.fixed_size else len(self.members))
        for member in range(len(self.members), self.size):
            if self.tasks[member].members == (member,):
                self.outputs[member] = FILLER
        return self.missing()

    def _fix(self, size: int) -> None:
        self.size, self.tasks = size, self.code.tasks(size)

    def missing(self) -> tuple[int, ...]:
        """Return the tasks of a sealed group that neither arrived nor are under way."""
        return tuple(t for t in self.tasks if t not in self.outputs and not self.live.get(t))

    def needs(self, task: int) -> tuple[int, ...]:
        """Return the queries that a task of a sealed group needs, fillers left out."""
        needed = self.tasks[task].members
        return tuple(self.members[i] for i in needed if i < len(self.members))

    def sent(self, task: int, attempt: int) -> None:
        """Record that an attempt at a task may answer."""
        self.live.setdefault(task, set()).add(attempt)

    def assigned(self, worker: int) -> None:
        """Count a task that a worker has now."""
        self.at[worker] = self.at.get(worker, 0) + 1

    def left(self, worker: int) -> None:
        """Count a task that a worker has no longer."""
        self.at[worker] -= 1
        if not self.at[worker]:
            del self.at[worker]

    def arrived(self, task: int, attempt: int) -> bool:
        """Take an output; return whether it is the task's first."""
        self.live.get(task, set()).discard(attempt)
        if task in self.outputs:
            return False
        self.outputs[task] = attempt
        self.has_extra |= task >= self.code.k
        return True

    def lost(self, task: int, attempt: int) -> None:
        """Record that an attempt will never answer."""
        self.live.get(task, set()).discard(attempt)

    def determined(self) -> frozenset[int]:
        """Return the members (fillers left out) that the outputs here determine."""
        return self._recoverable(frozenset(self.outputs))

    def guessable(self) -> bool:
        """Return whether there is some answer for every member: a parity is here that guesses."""
        return not self.is_open and self.code.guesses and self.has_extra

    def hopeful(self) -> frozenset[int]:
        """Return the members that will be determined if every live attempt answers."""
        coming = {task for task, attempts in self.live.items() if attempts}
        return self._recoverable(frozenset(self.outputs) | coming)

    def _recoverable(self, tasks: frozenset[int]) -> frozenset[int]:
        if self.is_open:
            return frozenset(t for t in tasks if t < len(self.members))
        found = self.code.recoverable(tasks, self.size)
        return frozenset(m for m in found if m < len(self.members))
