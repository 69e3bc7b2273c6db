"""The service: answers requests. It knows no HTTP; faces make requests of what clients send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.serving.answers import Answered, BadRequest, DeadlinePassed, QueryFailed
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.served import OUTCOME, Served

LONGEST_NAME = 100
"""Characters of a request's name in the log."""
AGREEMENT = "agreement_probability"
"""The parameter of an answer by which it tells the lowest probability, over the request's
approximate answers, that one agrees with the served model; direct answers have none."""
LIMIT = "max_disagreement"
"""The parameter of a request that asks for a limit, and of its answer that tells which stood."""


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        inputs: name -> (B, *shape), every input of the served signature.
        identity: what the client calls the request.
        parameters: the client's own; the answer repeats them.
        accept_decoded: whether approximate answers will do.
        timeout: seconds from the request's arrival; None: the service's own deadline.
        outputs: the name of each output that is wanted, and whether it is sent in binary.
        max_disagreement: the share of released approximate answers that may disagree.
        unknown: names of parameters that mean nothing here, but maybe to the model's own server.
    """

    inputs: Mapping[str, np.ndarray]
    identity: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    accept_decoded: bool = True
    timeout: float | None = None
    outputs: tuple[tuple[str, bool], ...] = ()
    max_disagreement: float | None = None
    unknown: tuple[str, ...] = ()

    def within(self, seconds: float) -> Request:
        """Return the request with a timeout of at most so many seconds."""
        own = seconds if self.timeout is None else self.timeout
        return replace(self, timeout=min(seconds, own))

    @property
    def name(self) -> str | None:
        """What the log calls the request."""
        return None if self.identity is None else self.identity[:LONGEST_NAME]

    @property
    def size(self) -> int:
        """How many bytes the inputs hold."""
        return sum(
            sum(map(len, array.ravel())) if array.dtype == object else array.nbytes
            for array in self.inputs.values()
        )

    def queries(self) -> list[dict[str, np.ndarray]]:
        """Return the request's queries: each has a batch of one of every input."""
        size = len(next(iter(self.inputs.values())))
        return [{name: rows[i : i + 1] for name, rows in self.inputs.items()} for i in range(size)]


@dataclass(frozen=True)
class Response:
    """An answered request.

    Attributes:
        outputs: name -> (B, *shape), of the outputs that were wanted.
        work_seconds: see `Answered`; the largest of the queries'.
        parameters: what the answer tells in place of the request's own.
    """

    outputs: Mapping[str, np.ndarray]
    work_seconds: float
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> int:
        """How many values the outputs hold; each byte of a text counts as one more."""
        texts = [array for array in self.outputs.values() if array.dtype == object]
        letters = sum(sum(map(len, array.ravel())) for array in texts)
        return letters + sum(array.size for array in self.outputs.values())


def output_specs(signature: Signature) -> tuple[TensorSpec, ...]:
    """Return all outputs of a response: the model's, and the outcome."""
    return (*signature.outputs, TensorSpec(outcome_name(signature), "BYTES", ()))


def outcome_name(signature: Signature) -> str:
    """Return the name of the outcome's output, which a model's own output may have already."""
    taken = any(spec.name == OUTCOME for spec in signature.outputs)
    return f"codedinvnet.{OUTCOME}" if taken else OUTCOME


class Service:
    """Answers requests to one served model.

    Args:
        front: answers queries.
        served: the model, as clients see it.
        tells: whether answers tell their outcome among their parameters as well.
        check: raises `BadRequest` of requests that are refused besides.
    """

    def __init__(
        self,
        front: FrontEnd,
        served: Served,
        *,
        tells: bool = False,
        check: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self.front, self.served, self.tells = front, served, tells
        self.check = check
        self.outcome = outcome_name(served.signature)

    async def answer(
        self,
        request: Request,
        *,
        began: float | None = None,
        gone: asyncio.Future[Any] | None = None,
    ) -> Response:
        """Answer a request: all of its queries, or none.

        Args:
            request: of the served model.
            began: see `FrontEnd.infer`.
            gone: likewise.

        Raises:
            BadRequest: if it wants direct answers, and there are none, or a limit on disagreement
                from a service without one.
            DeadlinePassed: if the time of all unanswered queries was over.
            QueryFailed: if others failed.
            NotNow: see `FrontEnd.check_room`.
        """
        self.check(request)
        if not request.accept_decoded and not self.front.scheduler.systematic:
            raise BadRequest("parameters.accept_decoded: this method has no direct answers")
        told: dict[str, Any] = {}
        asked, reliance = request.max_disagreement, self.front.reliance
        if asked is not None:
            if reliance is None or reliance.limit is None:
                raise BadRequest(
                    "parameters.max_disagreement: this service keeps no limit; it needs "
                    "--max-disagreement"
                )
            told[LIMIT] = reliance.kept(asked)
        known = (*self.served.decoded, self.outcome)
        found = await self.front.infer(
            request.queries(),
            accept_decoded=request.accept_decoded
            and all(name in known for name, _ in request.outputs),
            deadline=request.timeout,
            began=began,
            gone=gone,
            name=request.name,
            limit=request.max_disagreement,
        )
        answers = [answer for answer in found if isinstance(answer, Answered)]
        if len(answers) < len(found):
            raise failure(found)
        if self.tells:
            told[OUTCOME] = ",".join(sorted({answer.outcome for answer in answers}))
        agreements = [one.agreement for one in answers if one.agreement is not None]
        if agreements:
            told[AGREEMENT] = min(agreements)
        return replace(self._joined(request, answers), parameters=told)

    def _joined(self, request: Request, answers: Sequence[Answered]) -> Response:
        outputs: dict[str, np.ndarray] = {}
        for name, _ in request.outputs:
            if name == self.outcome:
                outcomes = np.empty(len(answers), object)
                outcomes[:] = [answer.outcome.encode() for answer in answers]
                outputs[name] = outcomes
            else:
                outputs[name] = np.concatenate([answer.outputs[name] for answer in answers])
        return Response(outputs, max(answer.work_seconds for answer in answers))


def failure(found: Sequence[Answered | QueryFailed]) -> QueryFailed:
    """Return the error of a request of which not every query was answered."""
    problems = [problem for problem in found if isinstance(problem, QueryFailed)]
    told = f"{len(problems)} of {len(found)} queries"
    for problem in problems:
        if not isinstance(problem, DeadlinePassed):
            return QueryFailed(f"{told} failed: {problem}")
    late = [problem for problem in problems if isinstance(problem, DeadlinePassed)]
    last = next((problem for problem in reversed(late) if problem.failure), late[-1])
    return DeadlinePassed(f"{told}: deadline passed", last.failure, last.where)
