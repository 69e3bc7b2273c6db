"""A small backup beside the upstreams: who computes it, and the answers that it gives.

A group is of whole requests, each with any number of queries. The backup takes all their queries as
one batch. It has workers of its own: local processes, or one upstream that has another model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codedinvnet.codes.rules import SMALL_BACKUP, CodeRules
from codedinvnet.models.base import TensorSpec
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.background import in_thread
from codedinvnet.serving.decoding import Answers, Check, Decoding, Facts, Found, Job, Wiring
from codedinvnet.serving.faces.http import LARGE_BODY
from codedinvnet.serving.gateway.calls import Reply
from codedinvnet.serving.gateway.pool import CALL, REPLY, UpstreamPool, boxed
from codedinvnet.serving.gateway.understanding import Understanding, arrays_of, call_of
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.workers.pool import Death, Task, WorkerFailed, WorkerPool
from codedinvnet.serving.workers.result import OUTPUT, Abandoned, Computer, Result
from codedinvnet.trust.confidence import LEAST, confidences

SCORES = "scores"
"""The name of the one output of an approximate answer."""


def converted(scores: np.ndarray, given: str, wanted: str) -> np.ndarray:
    """Return scores (B, classes) as another kind of them, "logits" or "probabilities"."""
    if given == wanted:
        return scores
    if wanted == "logits":
        logits: np.ndarray = np.log(scores.clip(min=LEAST))
        return logits
    with np.errstate(invalid="ignore"):  # of what is not finite, neither is the result
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        found: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return found


class UpstreamBackup:
    """An upstream with another model, as a worker.

    Args:
        upstream: a pool of it alone.
        inputs: the model's.
        scores: its output that has them.
        convert: makes them scores of the served model's kind.
        most: queries that it takes at once.
        slots: questions that it is at, at most: a task of many queries is several.
    """

    def __init__(
        self,
        upstream: UpstreamPool,
        inputs: Sequence[TensorSpec],
        scores: str,
        convert: Callable[[np.ndarray], np.ndarray],
        most: int,
        slots: int,
    ) -> None:
        self.upstream, self.inputs, self.scores = upstream, inputs, scores
        self.convert, self.most = convert, most
        self._slots = asyncio.Semaphore(slots)

    @property
    def on_death(self) -> Death | None:
        """See `WorkerPool`."""
        return self.upstream.on_death

    @on_death.setter
    def on_death(self, told: Death | None) -> None:
        self.upstream.on_death = told

    async def start(self, size: int) -> None:
        await self.upstream.start(size)

    async def call(self, worker: int, task: Task) -> Result:
        begins = range(0, task.members, self.most)
        useless = asyncio.Event()
        found = await asyncio.gather(*(self._part(worker, task, i, useless) for i in begins))
        seconds = max(result.seconds for result, _ in found)
        return Result({OUTPUT: np.concatenate([scores for _, scores in found])}, seconds)

    async def _part(
        self, worker: int, task: Task, begin: int, useless: asyncio.Event
    ) -> tuple[Result, np.ndarray]:
        """Ask for so many queries' scores as the model takes at once."""
        async with self._slots:
            if useless.is_set() or time.monotonic() > task.until:
                raise Abandoned("nobody waits for it any more")
            arrays = {n: array[begin : begin + self.most] for n, array in task.inputs.items()}
            call = call_of(self.upstream.model, arrays, self.inputs, task.until)
            try:
                result = await self.upstream.call(worker, task._replace(inputs={CALL: boxed(call)}))
            except BaseException:  # without this part the others are of no use
                useless.set()
                raise
        try:
            return result, self.convert(arrays_of(result.outputs[REPLY][0])[self.scores])
        except (BadRequest, LookupError, AttributeError) as error:
            raise WorkerFailed(f"the backup's answer: {error}") from error

    async def replace(self, worker: int) -> None:
        await self.upstream.replace(worker)

    async def stop(self) -> None:
        await self.upstream.stop()

    def pid(self, worker: int) -> int | None:
        return None


class ProtectedPool:
    """Upstreams, and behind them the workers of a small backup.

    A member of a group has no scores (None) if it was not understood, or if they are not finite.

    Args:
        upstreams: the first workers.
        backup: the others.
        scores: the shape of one query's scores.
    """

    def __init__(
        self, upstreams: UpstreamPool, backup: WorkerPool, scores: tuple[int, ...]
    ) -> None:
        self.upstreams, self.backup, self.scores = upstreams, backup, scores
        self.mains = len(upstreams.places)
        if isinstance(backup, UpstreamBackup):
            backup.upstream.first = self.mains
        self.on_death: Death | None = None

    async def start(self, size: int) -> None:
        self.upstreams.on_death = self.on_death
        self.backup.on_death = self._backup_died
        await self.upstreams.start(self.mains)
        await self.backup.start(size - self.mains)

    def _backup_died(self, worker: int, reason: str) -> None:
        if self.on_death is not None:
            self.on_death(self.mains + worker, reason)

    async def call(self, worker: int, task: Task) -> Result:
        if worker < self.mains:
            return await self.upstreams.call(worker, task)
        requests = [call.request for call in task.inputs[CALL]]
        read = [request.inputs for request in requests if request is not None]
        answers = np.empty(len(requests), object)
        if not read:
            return Result({OUTPUT: answers}, 0.0)
        inputs = {name: np.concatenate([one[name] for one in read]) for name in read[0]}
        result = await self.backup.call(worker - self.mains, task._replace(inputs=inputs))
        scores = result.outputs[OUTPUT]
        rows = len(next(iter(inputs.values())))
        if scores.shape != (rows, *self.scores):
            raise WorkerFailed(f"the backup's scores have shape {scores.shape}")
        place = 0
        for member, request in enumerate(requests):
            if request is not None:
                size = len(next(iter(request.inputs.values())))
                own = scores[place : place + size]
                if np.isfinite(own).all():  # otherwise the request is to blame, and has no answer
                    answers[member] = own
                place += size
        return result._replace(outputs={OUTPUT: answers})

    async def replace(self, worker: int) -> None:
        if worker < self.mains:
            await self.upstreams.replace(worker)
        else:
            await self.backup.replace(worker - self.mains)

    async def stop(self) -> None:
        await asyncio.gather(self.upstreams.stop(), self.backup.stop())

    def pid(self, worker: int) -> int | None:
        return None if worker < self.mains else self.backup.pid(worker - self.mains)


class RelayOutputs(Outputs):
    """What upstreams and backups send: replies, and the scores of each member of a group."""

    def mixed(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return outputs[OUTPUT] if OUTPUT in outputs else outputs[REPLY]

    def sound(self, task: Task, result: Result) -> Result:
        return result


class Backing(NamedTuple):
    """What stands for a scheme where a small backup answers for whole requests."""

    rules: CodeRules
    understanding: Understanding
    name: str = SMALL_BACKUP
    reads: type[Outputs] = RelayOutputs

    def queue(self, wiring: Wiring) -> BackupAnswers:
        """Return what answers in place of a `Decoder`."""
        return BackupAnswers(self, wiring)


class BackupAnswers(Decoding):
    """Gives the backup's answers; compares some of them with upstreams' own.

    Args:
        backing: says how answers are read.
        wiring: see `Wiring`.
    """

    def __init__(self, backing: Backing, wiring: Wiring) -> None:
        super().__init__(wiring)
        self.backing = backing

    def stop(self) -> None:
        """There is nothing to let go of."""

    async def learn(self, outputs: Outputs, computer: Computer) -> None:
        """There is nothing to learn: scores are checked where they come from."""

    async def answers(self, jobs: Sequence[Job]) -> Sequence[Answers | Exception]:
        found: list[Answers | Exception] = []
        for job in jobs:
            try:
                found.append(self._answered(job))
            except Exception as error:  # no job fails for another
                found.append(error)
        return found

    async def check(self, check: Check) -> None:
        compared, members = self.wiring.compared, [check.member]
        if compared is not None:
            members = [task for task in check.workers if task < check.size]
        chances = [self._random.random() for _ in members]

        def look() -> dict[int, tuple[float, bool]]:
            pairs = zip(members, chances, strict=True)
            found = {i: self._compare(check.outputs, i, chance) for i, chance in pairs}
            return {i: facts for i, facts in found.items() if facts is not None}

        replies: list[Reply] = [check.outputs[i][0] for i in members]
        large = any(
            len(reply.body) >= LARGE_BODY or "content-encoding" in dict(reply.headers)
            for reply in replies
        )
        seen = await in_thread(look) if large else look()
        if check.member in seen:
            self.wiring.metrics.checked(seen[check.member][1])
        if compared is not None and seen:
            told = tuple((i, *facts) for i, facts in seen.items())
            compared(check, Facts(seen.get(check.member), told))

    def _compare(
        self, outputs: Mapping[int, np.ndarray], member: int, chance: float
    ) -> tuple[float, bool] | None:
        """Return the confidence for a request, and whether one of its answers agrees.

        None if the upstream's answer or the backup's has no scores. The chance, below 1, says
        which answer is looked at.
        """
        reply: Reply = outputs[member][0]
        scores = self._scores(outputs, member)
        if scores is None or reply.fails:
            return None
        try:
            own = self.backing.understanding.scores_of(reply)
        except BadRequest:  # an error of the model's own
            return None
        query = int(chance * len(scores))
        return self._confidence(scores), bool(own[query].argmax() == scores[query].argmax())

    def _answered(self, job: Job) -> Answers:
        found: dict[int, Found | Exception] = {}
        for query, member in job.wanted.items():
            scores = self._scores(job.outputs, member)
            if scores is None:
                found[query] = ValueError("the small backup has no finite scores of it")
            else:
                found[query] = Found({SCORES: boxed(scores)}, self._confidence(scores))
        return found

    def _scores(self, outputs: Mapping[int, np.ndarray], member: int) -> np.ndarray | None:
        """Return the backup's scores of a request; None if it has none."""
        rules = self.backing.rules  # of several extra tasks each is over some members alone
        task, place = rules.k + member % rules.r, member // rules.r
        found: np.ndarray | None = outputs[task][place]
        return found

    def _confidence(self, scores: np.ndarray) -> float:
        """Return the least confidence of a request's queries."""
        kind = self.backing.understanding.served.kind
        return float(confidences(scores, kind).min())
