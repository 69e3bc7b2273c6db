"""Approximate answers: decoding of workers' outputs by a scheme.

What comes in while one batch is computed is the next batch. Complete groups are checked while no
answer waits.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.net.background import Background, log_error
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.served import Served

T = TypeVar("T")
CHECKED_SHARE = 0.5
"""Share of the complete groups that live agreement is measured on, at most."""
WAITING_CHECKS = 4
"""So many checks wait until no answer does, the newest; older ones are left out."""


class Job(NamedTuple):
    """Answers to compute, of a group's members."""

    size: int
    """The group's."""
    outputs: dict[int, np.ndarray]
    """Task -> (n,)."""
    wanted: Mapping[int, int]
    """Query -> member."""


class Found(NamedTuple):
    """What was computed for a query."""

    outputs: Mapping[str, np.ndarray]
    """See `Answered`."""
    confidence: float
    """The largest probability; not finite if the scores are not."""


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
    """The members that extra tasks answer for by themselves, with confidence and agreement."""


Answers: TypeAlias = "Mapping[int, Found] | Exception"
"""Query -> what was found for it; or why nothing was."""


class Decoder:
    """Computes answers in a thread of its own."""

    def __init__(self, scheme: Scheme, served: Served, metrics: Metrics) -> None:
        self.scheme, self.served, self.metrics = scheme, served, metrics
        self.finished: Callable[[Job, Answers], None] = lambda job, answers: None
        """Called with each job, and what was found for its queries."""
        self.compared: Callable[[Check, Facts], None] | None = None
        """Called with each check, and what it says of answers."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._background = Background()
        self._jobs: list[Job] = []
        self._checks: deque[Check] = deque(maxlen=WAITING_CHECKS)
        self._random = random.Random(0)
        self._running = False

    def add(self, job: Job) -> None:
        """Compute a job, with those that come in the meantime."""
        self._jobs.append(job)
        self._run()

    def offer(self, size: int, outputs: dict[int, np.ndarray], workers: Mapping[int, int]) -> None:
        """Take a complete group (task -> output and worker), of which a member may be decoded."""
        if self._random.random() >= CHECKED_SHARE:
            return
        members = [task for task in workers if task < size]  # a filler proves nothing
        if members:
            self._checks.append(Check(size, outputs, dict(workers), self._random.choice(members)))
            self._run()

    def _run(self) -> None:
        """Compute what waits, unless that is under way."""
        if (self._jobs or self._checks) and not self._running:
            self._running = True
            self._background.spawn(self._work())

    async def _work(self) -> None:
        """Compute what waits, answers first, until nothing does."""
        try:
            while self._jobs or self._checks:
                if self._jobs:
                    jobs, self._jobs = self._jobs, []
                    for job, found in zip(
                        jobs, await self.apart(self._computed, jobs), strict=True
                    ):
                        self.finished(job, found)
                else:
                    await self._check(self._checks.popleft())
        finally:
            self._running = False

    def _computed(self, jobs: Sequence[Job]) -> list[Answers]:
        began = time.perf_counter()
        try:
            return compute_apart(self.scheme, self.served, jobs)
        except Exception as error:
            return [error] * len(jobs)
        finally:
            self.metrics.decode_time.observe(time.perf_counter() - began)

    async def _check(self, check: Check) -> None:
        """Compare approximate answers of a complete group with the direct ones."""
        try:
            facts = await self.apart(compare, self.scheme, self.served, check)
            if facts.decoded is not None:
                self.metrics.checked(facts.decoded[1])
            if self.compared is not None:
                self.compared(check, facts)
        except Exception as error:  # answers wait behind it
            log_error(error)

    async def apart(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do some work in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)

    async def stop(self) -> None:
        """Let go of the thread."""
        await self._background.stop()
        self.thread.shutdown(wait=False, cancel_futures=True)


def compute(scheme: Scheme, served: Served, jobs: Sequence[Job]) -> list[dict[int, Found]]:
    """Return for each job what was found for the queries that it wants.

    Decodings of equal size and with the same outputs at hand are computed together.
    """
    found: list[dict[int, Found]] = [{} for _ in jobs]
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, job in enumerate(jobs):
        alike.setdefault((job.size, tuple(sorted(job.outputs))), []).append(i)
    for (size, tasks), rows in alike.items():
        outputs = {t: torch.from_numpy(np.stack([jobs[i].outputs[t] for i in rows])) for t in tasks}
        decoded = scheme.decode(outputs, size)
        for position, i in enumerate(rows):
            for query, member in jobs[i].wanted.items():
                (found[i][query],) = answers(served, decoded[member][position][None])
    return found


def compute_apart(scheme: Scheme, served: Served, jobs: Sequence[Job]) -> list[Answers]:
    """Compute jobs together; if that fails, each for itself, so that none fails for another."""
    try:
        return list(compute(scheme, served, jobs))
    except Exception:
        found: list[Answers] = []
        for job in jobs:
            try:
                found += compute(scheme, served, [job])
            except Exception as error:
                found.append(error)
        return found


def answers(served: Served, scores: Tensor) -> list[Found]:
    """Return the answers that rows of scores (B, classes) are."""
    sure = served.sure(scores).tolist()
    return [Found(*row) for row in zip(served.answer(scores), sure, strict=True)]


def compare(scheme: Scheme, served: Served, check: Check) -> Facts:
    """Compare approximate answers of a complete group with the direct ones."""
    complete = {task: torch.from_numpy(output)[None] for task, output in check.outputs.items()}
    own = {}
    for task in check.workers:
        if task < check.size and (direct := scheme.direct(complete[task])) is not None:
            own[task] = direct

    def seen(scores: Tensor, member: int) -> tuple[float, bool]:
        (found,) = answers(served, scores)
        return found.confidence, served.agree(scores, own[member])

    decoded = None
    if check.member in own:
        rest = {task: output for task, output in complete.items() if task != check.member}
        scores = scheme.decode(rest, check.size).get(check.member)
        decoded = None if scores is None else seen(scores, check.member)
    extra = {task: output for task, output in complete.items() if task >= scheme.rules.k}
    guesses: Mapping[int, Tensor] = {}
    if scheme.rules.guesses or scheme.rules.recoverable(frozenset(extra), check.size):
        guesses = scheme.decode(extra, check.size)
    return Facts(decoded, tuple((i, *seen(scores, i)) for i, scores in guesses.items() if i in own))
