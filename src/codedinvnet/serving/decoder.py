"""Heads and decoding: answers of outputs by a scheme, in a thread unless they are few."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.protect.confidence import confidences
from codedinvnet.serving.decoding import Check, Decoding, Facts, Found, Job, Wiring
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.served import Served
from codedinvnet.serving.workers.result import Computer

T = TypeVar("T")
FEW = 2
"""Direct answers that are computed where they are wanted: the way to the thread and back would add
half as much processor time again, and two switches of threads."""


class Decoder(Decoding):
    """Decodes in a thread of its own, all but a few direct answers.

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

    async def learn(self, outputs: Outputs, computer: Computer) -> None:
        await self._apart(outputs.learn, computer)

    async def _apart(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what work in the thread returns."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)

    async def answers(self, jobs: Sequence[Job]) -> Sequence[Mapping[int, Found] | Exception]:
        began = time.perf_counter()
        try:
            if len(jobs) <= FEW and not any(job.size for job in jobs):
                return compute_apart(self.scheme, self.served, jobs)
            return await self._apart(compute_apart, self.scheme, self.served, jobs)
        except Exception as error:
            return [error] * len(jobs)
        finally:
            self.wiring.metrics.decode_time.observe(time.perf_counter() - began)

    async def check(self, check: Check) -> None:
        metrics, compared, facts = self.wiring.metrics, self.wiring.compared, Facts()
        found = await self._apart(check_group, self.scheme, check.outputs, check.size, check.member)
        if compared is not None:
            facts = await self._apart(facts_of, self.scheme, self.served, check, found.decoded)
        if found.agrees is not None:
            metrics.checked(found.agrees)
        if found.residual is not None:
            for task, worker in check.workers.items():
                role = "parity" if task >= self.scheme.rules.k else "data"
                metrics.residual_seen(worker, role, found.residual)
        if compared is not None:
            compared(check, facts)


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
    sure = confidences(scores.float().cpu().numpy(), served.kind).tolist()
    return [Found(*row) for row in zip(served.answer(scores), sure, strict=True)]


class Checked(NamedTuple):
    """What a complete group shows; None: it does not."""

    decoded: Tensor | None
    """Scores (1, classes) of a member that has a direct answer, as if that were missing."""
    agrees: bool | None
    """Whether their label is the direct one."""
    residual: float | None


def check_group(
    scheme: Scheme, outputs: Mapping[int, np.ndarray], size: int, member: int
) -> Checked:
    """Decode a member of a complete group, and measure the group's residual."""
    complete = {task: torch.from_numpy(output)[None] for task, output in outputs.items()}
    residual = scheme.residual(complete, size)
    decoded, agrees = None, None
    direct = scheme.direct(complete[member]) if member in complete else None
    if direct is not None:
        rest = {task: output for task, output in complete.items() if task != member}
        decoded = scheme.decode(rest, size).get(member)
        if decoded is not None:
            agrees = int(decoded.argmax(1)) == int(direct.argmax(1))
    return Checked(decoded, agrees, None if residual is None else float(residual[0]))


def facts_of(scheme: Scheme, served: Served, check: Check, decoded: Tensor | None) -> Facts:
    """Compare approximate answers of a complete group with the direct ones.

    Args:
        scheme: guesses.
        served: makes answers of scores.
        check: the group.
        decoded: what `check_group` found of the check's member.
    """
    complete = {task: torch.from_numpy(output)[None] for task, output in check.outputs.items()}
    labels = {}
    for task in check.workers:
        if task < check.size and (direct := scheme.direct(complete[task])) is not None:
            labels[task] = int(direct.argmax(1))

    def seen(scores: Tensor, member: int) -> tuple[float, bool]:
        (found,) = answers(served, scores)
        return found.confidence, int(scores.argmax(1)) == labels[member]

    extra = {task: output for task, output in complete.items() if task >= scheme.rules.k}
    guesses: Mapping[int, Tensor] = {}
    if scheme.rules.guesses or scheme.rules.recoverable(frozenset(extra), check.size):
        guesses = scheme.decode(extra, check.size)
    return Facts(
        None if decoded is None or check.member not in labels else seen(decoded, check.member),
        tuple((i, *seen(scores, i)) for i, scores in guesses.items() if i in labels),
    )
