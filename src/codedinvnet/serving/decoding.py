"""Heads and decoding: from workers' outputs to answers, in batches.

What has come in while the last batch was computed is the next batch.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import Rules
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.served import Served

T = TypeVar("T")

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


Compared: TypeAlias = "Callable[[Check, Facts], None]"
Finished: TypeAlias = "Callable[[Job, Mapping[int, Found] | Exception], None]"
"""Called with a job, and what was found for each of its queries, or why nothing was."""


class Wiring(NamedTuple):
    """What a `Decoding` counts in, runs by, and tells."""

    metrics: Metrics
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    """Starts a task of the event loop."""
    finished: Finished
    failed: Callable[[Exception], None]
    """Called with what went wrong with a check."""
    seed: int = 0
    """The seed of the sample of groups that are checked."""
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
        self._random = random.Random(wiring.seed)
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
    async def answers(self, jobs: Sequence[Job]) -> Sequence[Mapping[int, Found] | Exception]:
        """Return for each job what was found for its queries, or why nothing was."""

    @abstractmethod
    async def check(self, check: Check) -> None:
        """Compare an approximate answer of a complete group with the direct one."""

    @abstractmethod
    def stop(self) -> None:
        """Let go of what it holds."""


class Answerer(Protocol):
    """What answers for members of a group without a scheme."""

    @property
    def name(self) -> str:
        """What it is called, as a method is."""

    @property
    def rules(self) -> Rules:
        """The tasks, and whom their outputs answer for."""

    @property
    def reads(self) -> type[Outputs]:
        """What knows the tasks' outputs."""

    def queue(self, wiring: Wiring) -> Decoding:
        """Return what makes its answers."""


class DecodingQueue(Decoding):
    """Decodes in a thread of its own.

    Args:
        scheme: decodes.
        served: makes answers of scores.
        wiring: see `Wiring`.
    """

    def __init__(self, scheme: Scheme, served: Served, wiring: Wiring) -> None:
        super().__init__(wiring)
        self.scheme, self.served = scheme, served
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def stop(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def apart(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what work in the thread returns."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)

    async def answers(self, jobs: Sequence[Job]) -> Sequence[Mapping[int, Found] | Exception]:
        began = time.perf_counter()
        try:
            return await self.apart(compute_apart, self.scheme, self.served, jobs)
        except Exception as error:
            return [error] * len(jobs)
        finally:
            self.wiring.metrics.decode_time.observe(time.perf_counter() - began)

    async def check(self, check: Check) -> None:
        metrics, compared, facts = self.wiring.metrics, self.wiring.compared, Facts()
        agrees, residual = await self.apart(
            check_group, self.scheme, check.outputs, check.size, check.member
        )
        if compared is not None:
            facts = await self.apart(facts_of, self.scheme, self.served, check)
        if agrees is not None:
            metrics.checked(agrees)
        if residual is not None:
            for task, worker in check.workers.items():
                role = "parity" if task >= self.scheme.rules.k else "data"
                metrics.residual_seen(worker, role, residual)
        if compared is not None:
            compared(check, facts)


def answering(
    scheme: Scheme | Answerer | None, served: Served
) -> tuple[Outputs, Callable[[Wiring], Decoding] | None]:
    """Return what knows workers' outputs, and what makes answers of them, if anything does."""
    if scheme is None:
        return Outputs(served), None
    if isinstance(scheme, Scheme):
        return Outputs(served, scheme), partial(DecodingQueue, scheme, served)
    return scheme.reads(served), scheme.queue


def compute(scheme: Scheme, served: Served, jobs: Sequence[Job]) -> list[dict[int, Found]]:
    """Return for each job what was found for the queries that it wants.

    Direct answers are computed together, and so are decodings of equal size and with the same
    outputs at hand.
    """
    found: list[dict[int, Found]] = [{} for _ in jobs]
    direct = [i for i, job in enumerate(jobs) if job.size == 0]
    if direct:
        scores = scheme.direct(torch.from_numpy(np.stack([jobs[i].outputs[0] for i in direct])))
        assert scores is not None
        for answer, i in zip(answers(served, scores), direct, strict=True):
            found[i] = dict.fromkeys(jobs[i].wanted, answer)
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, job in enumerate(jobs):
        if job.size:
            alike.setdefault((job.size, tuple(sorted(job.outputs))), []).append(i)
    for (size, tasks), rows in alike.items():
        outputs = {t: torch.from_numpy(np.stack([jobs[i].outputs[t] for i in rows])) for t in tasks}
        decoded = scheme.decode(outputs, size)
        for position, i in enumerate(rows):
            for query, member in jobs[i].wanted.items():
                (found[i][query],) = answers(served, decoded[member][position][None])
    return found


def compute_apart(
    scheme: Scheme, served: Served, jobs: Sequence[Job]
) -> list[dict[int, Found] | Exception]:
    """Compute jobs together; if that fails, each for itself, so that none fails for another."""
    try:
        return list(compute(scheme, served, jobs))
    except Exception:
        found: list[dict[int, Found] | Exception] = []
        for job in jobs:
            try:
                found += compute(scheme, served, [job])
            except Exception as error:
                found.append(error)
        return found


def answers(served: Served, scores: Tensor) -> list[Found]:
    """Return the answers that rows of scores (B, classes) are."""
    probabilities = scores.softmax(1) if served.kind == "logits" else scores
    confidences = probabilities.amax(1).tolist()
    return [Found(*row) for row in zip(served.answer(scores), confidences, strict=True)]


def check_group(
    scheme: Scheme, outputs: Mapping[int, np.ndarray], size: int, member: int
) -> tuple[bool | None, float | None]:
    """Return whether a member's decoded label is its direct one, and the group's residual."""
    complete = {task: torch.from_numpy(output)[None] for task, output in outputs.items()}
    residual = scheme.residual(complete, size)
    agrees: bool | None = None
    direct = scheme.direct(complete[member]) if member in complete else None
    if direct is not None:
        rest = {task: output for task, output in complete.items() if task != member}
        decoded = scheme.decode(rest, size).get(member)
        if decoded is not None:
            agrees = int(decoded.argmax(1)) == int(direct.argmax(1))
    return agrees, None if residual is None else float(residual[0])


def facts_of(scheme: Scheme, served: Served, check: Check) -> Facts:
    """Compare approximate answers of a complete group with the direct ones."""
    complete = {task: torch.from_numpy(output)[None] for task, output in check.outputs.items()}
    labels = {}
    for task in check.workers:
        if task < check.size and (direct := scheme.direct(complete[task])) is not None:
            labels[task] = int(direct.argmax(1))

    def seen(scores: Tensor, member: int) -> tuple[float, bool]:
        (found,) = answers(served, scores)
        return found.confidence, int(scores.argmax(1)) == labels[member]

    rest = {task: output for task, output in complete.items() if task != check.member}
    decoded = scheme.decode(rest, check.size).get(check.member)
    extra = {task: output for task, output in complete.items() if task >= scheme.rules.k}
    guesses: Mapping[int, Tensor] = {}
    if scheme.rules.guesses or scheme.rules.recoverable(frozenset(extra), check.size):
        guesses = scheme.decode(extra, check.size)
    return Facts(
        None if decoded is None or check.member not in labels else seen(decoded, check.member),
        tuple((i, *seen(scores, i)) for i, scores in guesses.items() if i in labels),
    )
