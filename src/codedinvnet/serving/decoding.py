"""Making answers of workers' outputs, in batches: the loop, whoever computes them.

What has come in while the last batch was computed is the next batch.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from codedinvnet.codes.rules import CodeRules
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.workers.result import Computer

CHECKED_SHARE = 0.5
"""Share of the complete groups that live agreement and residuals are measured on, at most."""
WAITING_CHECKS = 4
"""So many checks wait until no answer does, the newest; older ones are left out."""


class Job(NamedTuple):
    """Answers to compute: of one query directly, or of a group's members."""

    size: int
    """The group's; 0 for a direct answer."""
    outputs: dict[int, np.ndarray]
    """Task -> (n,)."""
    wanted: Mapping[int, int]
    """Query -> member."""


class Found(NamedTuple):
    """What was computed for a query."""

    outputs: Mapping[str, np.ndarray]
    """See `Answered`."""
    confidence: float
    """The largest probability; not finite if the scores are none."""


class Check(NamedTuple):
    """A complete group, one member of which is decoded as if it were missing."""

    size: int
    outputs: dict[int, np.ndarray]
    workers: dict[int, int]
    """Task -> worker."""
    member: int


class Facts(NamedTuple):
    """What a complete group says of answers."""

    decoded: tuple[float, bool] | None = None
    """The confidence of the checked member's decoded answer, and whether it agrees."""
    guessed: tuple[tuple[int, float, bool], ...] = ()
    """The members that the extra tasks alone answer for: each with confidence and agreement."""


Answers: TypeAlias = "Mapping[int, Found | Exception]"
"""Query -> what was found for it, or why nothing was."""
Compared: TypeAlias = "Callable[[Check, Facts], None]"
Finished: TypeAlias = "Callable[[Job, Answers | Exception], None]"
"""Called with a job, and what was found for each of its queries, or why nothing was."""


class Wiring(NamedTuple):
    """What a `Decoding` counts in, runs by, and tells."""

    metrics: Metrics
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    """Starts a task of the event loop."""
    finished: Finished
    failed: Callable[[Exception], None]
    """Called with what went wrong with a check."""
    compared: Compared | None = None
    """Called with each check, and what it says of answers; None: it is not asked for."""


class Decoding(ABC):
    """Makes answers of workers' outputs; checks complete groups while no answer waits.

    Args:
        wiring: see `Wiring`.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._jobs: list[Job] = []
        self._checks: deque[Check] = deque(maxlen=WAITING_CHECKS)
        self._random = random.Random(0)
        self._running = False

    def add(self, job: Job) -> None:
        """Take a job, which `run` computes."""
        self._jobs.append(job)

    def offer(self, size: int, outputs: dict[int, np.ndarray], workers: Mapping[int, int]) -> None:
        """Take a complete group, a member of which may be answered as if it were missing.

        Args:
            size: its members.
            outputs: task -> output.
            workers: task -> the worker that computed it.
        """
        if self._random.random() >= CHECKED_SHARE:
            return
        members = [task for task in workers if task < size]  # a filler proves nothing
        if members:
            self._checks.append(Check(size, outputs, dict(workers), self._random.choice(members)))

    def run(self) -> None:
        """Compute what waits, unless that is under way."""
        if (self._jobs or self._checks) and not self._running:
            self.wiring.spawn(self._work())
            self._running = True

    async def _work(self) -> None:
        """Compute what waits, answers first, until nothing does."""
        try:
            while self._jobs or self._checks:
                if self._jobs:
                    jobs, self._jobs = self._jobs, []
                    for job, found in zip(jobs, await self.answers(jobs), strict=True):
                        self.wiring.finished(job, found)
                    continue
                try:
                    await self.check(self._checks.popleft())
                except Exception as error:  # answers wait behind it
                    self.wiring.failed(error)
        finally:
            self._running = False

    @abstractmethod
    async def learn(self, outputs: Outputs, computer: Computer) -> None:
        """Let what knows the tasks' outputs see one of each kind, before the first job."""

    @abstractmethod
    async def answers(self, jobs: Sequence[Job]) -> Sequence[Answers | Exception]:
        """Return for each job what was found for its queries, or why nothing was."""

    @abstractmethod
    async def check(self, check: Check) -> None:
        """Compare an approximate answer of a complete group with the direct one."""

    @abstractmethod
    def stop(self) -> None:
        """Let go of what it holds."""


@runtime_checkable
class Answerer(Protocol):
    """What answers for members of a group without a scheme."""

    @property
    def name(self) -> str:
        """What it is called, as a method is."""

    @property
    def rules(self) -> CodeRules:
        """The tasks, and whom their outputs answer for."""

    @property
    def reads(self) -> type[Outputs]:
        """What knows the tasks' outputs."""

    def queue(self, wiring: Wiring) -> Decoding:
        """Return what makes its answers."""
