"""The inference service: answers requests of the protocol, over whatever network API they came."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from codedinvnet.models.base import Signature
from codedinvnet.net.protocol.messages import (
    Head,
    InferRequest,
    InferResponse,
    InputTensor,
    Limits,
    Metadata,
    ProtocolError,
    short,
)
from codedinvnet.net.protocol.tensors import TensorSpec
from codedinvnet.serving.answers import Answered, DeadlinePassed, InputRefused, QueryFailed
from codedinvnet.serving.dispatch import Dispatcher
from codedinvnet.serving.served import OUTCOME, Served

VERSION = "1"
"""Of the served model."""
LONGEST_NAME = 100
"""Characters of a request's name in the log."""
LONGEST_TIMEOUT = 1e12
"""Microseconds; a longer timeout is none."""
DIRECT = "direct"
"""The outcome of the model's own answers."""
AGREEMENT = "agreement_probability"
"""The parameter of an answer that gives the lowest probability, over the request's approximate
answers, that one agrees with the served model; direct answers have none."""
LIMIT = "max_disagreement"
"""The parameter of a request that asks for a limit, and of its answer that gives the one in
force."""


class NoModel(Exception):
    """There is no such model or version."""


class ServedResponse(NamedTuple):
    """An answered request."""

    message: InferResponse
    work_seconds: float
    """See `Answered`; the largest of the queries'."""
    outcome: str = DIRECT
    """`direct` if all of its queries were, else `decoded`, or `guessed` if one was."""
    agreement: float | None = None
    """The lowest probability that an approximate answer agrees; None without one."""

    @property
    def values(self) -> int:
        """How many values its outputs hold; each byte of a text counts as one more."""
        arrays = self.message.outputs.values()
        letters = sum(sum(map(len, array.ravel())) for array in arrays if array.dtype == object)
        return letters + sum(array.size for array in arrays)


@dataclass(frozen=True)
class Terms:
    """What a request's parameters say.

    Attributes:
        accept_decoded: whether approximate answers will do.
        timeout: seconds from the request's arrival; None: the service's own deadline.
        max_disagreement: the share of released approximate answers that may disagree.
    """

    accept_decoded: bool = True
    timeout: float | None = None
    max_disagreement: float | None = None

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Terms:
        """Read a request's parameters.

        Raises:
            ProtocolError: naming the parameter that is wrong.
        """
        accept = parameters.get("accept_decoded", True)
        if not isinstance(accept, bool):
            why = f"must be true or false, got {short(accept)}"
            raise ProtocolError(f"parameters.accept_decoded: {why}")
        timeout = _number(parameters, "timeout")
        if timeout is not None and not timeout > 0:
            why = f"must be microseconds above 0, got {short(parameters['timeout'])}"
            raise ProtocolError(f"parameters.timeout: {why}")
        limit = _number(parameters, LIMIT)
        if limit is not None and not 0 < limit < 1:
            why = f"must lie between 0 and 1, got {short(parameters[LIMIT])}"
            raise ProtocolError(f"parameters.{LIMIT}: {why}")
        return cls(accept, None if timeout is None else min(timeout, LONGEST_TIMEOUT) / 1e6, limit)


def _number(parameters: Mapping[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else -1.0


class InferenceService:
    """Answers requests to one served model."""

    def __init__(self, dispatcher: Dispatcher, served: Served, max_batch: int, memory: int) -> None:
        self.dispatcher, self.served, self.max_batch = dispatcher, served, max_batch
        signature = served.signature
        self.inputs = {spec.name: spec for spec in signature.inputs}
        self.limits = Limits.of(signature.inputs, max_batch, memory)
        self.outcome = outcome_name(signature)
        outcome = TensorSpec(self.outcome, "BYTES", ())
        self.metadata = Metadata(
            served.name,
            signature.inputs,
            (*signature.outputs, outcome),
            signature.platform,
            (VERSION,),
        )
        self.outputs = tuple(spec.name for spec in self.metadata.outputs)

    def check_model(self, name: str, version: str | None) -> None:
        """Refuse another model or version.

        Raises:
            NoModel: naming it.
        """
        own = self.served.name
        if name != own or version not in (None, "", VERSION):
            given = f"{short(name)} version {short(version or VERSION)}"
            raise NoModel(f"no model {given}; there is {own!r} {VERSION}")

    def check(self, head: Head) -> None:
        """Refuse a request that does not fit the model, before its tensors' values are read.

        Raises:
            ProtocolError: naming the field.
            NotNow: see `Dispatcher.check_room`.
        """
        if len(head.inputs) != len(self.inputs):
            names, given = ", ".join(map(repr, self.inputs)), len(head.inputs)
            raise ProtocolError(
                f"inputs: the model takes {len(self.inputs)} ({names}), got {given}"
            )
        for i, tensor in enumerate(head.inputs):
            self._check_tensor(f"inputs.{i}", tensor)
            batch, first = tensor.shape[0], head.inputs[0]
            if batch != first.shape[0]:
                why = f"{tensor.name!r} has {batch} queries, {first.name!r} has {first.shape[0]}"
                raise ProtocolError(f"inputs.{i}.shape: {why}")
        for i, output in enumerate(head.outputs):
            if output.name not in self.outputs:
                why = f"{short(output.name)} is not one of {', '.join(self.outputs)}"
                raise ProtocolError(f"outputs.{i}.name: {why}")
            own = output.parameters
            if own and (own.get("classification") or "shared_memory_region" in own):
                why = "classification and shared memory are not supported"
                raise ProtocolError(f"outputs.{i}.parameters: {why}")
        if head.inputs[0].shape[0] > 1:  # for one there was room when it came
            self.dispatcher.check_room(head.inputs[0].shape[0])

    def _check_tensor(self, where: str, tensor: InputTensor) -> None:
        """Refuse an input whose name, datatype or shape is not the model's."""
        spec = self.inputs.get(tensor.name)
        if spec is None:
            names = ", ".join(map(repr, self.inputs))
            raise ProtocolError(f"{where}.name: must be {names}, got {short(tensor.name)}")
        datatypes = self.served.datatypes(spec)
        if tensor.datatype not in datatypes:
            why = f"{spec.name!r} must be {' or '.join(datatypes)}, got {short(tensor.datatype)}"
            raise ProtocolError(f"{where}.datatype: {why}")
        shape = tensor.shape
        if shape[1:] != spec.shape or not shape or shape[0] < 1:
            dims = ", ".join(map(str, ("B", *spec.shape)))
            why = f"{spec.name!r} must be [{dims}] with B >= 1, got {short(list(shape))}"
            raise ProtocolError(f"{where}.shape: {why}")
        if shape[0] > self.max_batch:
            raise ProtocolError(f"{where}.shape: at most {self.max_batch} queries, got {shape[0]}")
        if "shared_memory_region" in tensor.parameters:
            raise ProtocolError(f"{where}.parameters: shared memory is not supported")

    async def answer(
        self,
        request: InferRequest,
        began: float,
        gone: asyncio.Future[Any] | None = None,
        seconds: float | None = None,
    ) -> ServedResponse:
        """Answer a request that `check` let through: all of its queries, or none.

        Args:
            request: of the served model.
            began: see `Dispatcher.infer`.
            gone: likewise.
            seconds: for which the client waits; None: it does not say.

        Raises:
            ProtocolError: if its values are wrong, or the service cannot keep to its terms.
            QueryFailed: if a query failed; InputRefused if its input is to blame, DeadlinePassed if
            only the time of some was over.
            NotNow: see `Dispatcher.check_room`.
        """
        for i, (name, values) in enumerate(request.inputs.items()):
            if why := self.served.incompatibility(self.inputs[name], values):
                raise ProtocolError(f"inputs.{i}.data: {why}")
        terms = Terms.of(request.parameters) if request.parameters else Terms()
        more = self._in_force(terms) if request.parameters else {}
        wanted = tuple(output.name for output in request.outputs) or self.outputs
        known = (*self.served.decoded, self.outcome)
        found = await self.dispatcher.infer(
            queries_of(request.inputs),
            accept_decoded=terms.accept_decoded and all(name in known for name in wanted),
            deadline=min((t for t in (terms.timeout, seconds) if t is not None), default=None),
            began=began,
            gone=gone,
            name=None if request.id is None else request.id[:LONGEST_NAME],
            limit=terms.max_disagreement,
        )
        answers = [answer for answer in found if isinstance(answer, Answered)]
        if len(answers) < len(found):
            raise failure(found)
        agreement = min(
            (one.agreement for one in answers if one.agreement is not None), default=None
        )
        if agreement is not None:
            more[AGREEMENT] = agreement
        outcome = max({answer.outcome for answer in answers} - {DIRECT}, default=DIRECT)
        if outcome != DIRECT:  # for clients that ask for no output of that name
            more[OUTCOME] = outcome
        message = InferResponse(
            {name: self._joined(name, answers) for name in wanted},
            self.served.name,
            VERSION,
            request.id,
            {**request.parameters, **more},
        )
        work = max(answer.work_seconds for answer in answers)
        return ServedResponse(message, work, outcome, agreement)

    def _in_force(self, terms: Terms) -> dict[str, Any]:
        """Return the limit on disagreement that holds for a request, if it asks for one.

        Raises:
            ProtocolError: if the service cannot keep to its terms.
        """
        if not terms.accept_decoded and not self.dispatcher.scheduler.systematic:
            raise ProtocolError("parameters.accept_decoded: this method has no direct answers")
        if terms.max_disagreement is None:
            return {}
        gate = self.dispatcher.gate
        if gate is None or gate.limit is None:
            why = "this service keeps no limit; it needs --max-disagreement"
            raise ProtocolError(f"parameters.{LIMIT}: {why}")
        return {LIMIT: gate.kept(terms.max_disagreement)}

    def _joined(self, name: str, answers: Sequence[Answered]) -> np.ndarray:
        """Return an output of a request's queries as one batch."""
        if name == self.outcome:
            outcomes = np.empty(len(answers), object)
            outcomes[:] = [answer.outcome.encode() for answer in answers]
            return outcomes
        if len(answers) == 1:
            return answers[0].outputs[name]
        return np.concatenate([answer.outputs[name] for answer in answers])


def queries_of(inputs: Mapping[str, np.ndarray]) -> list[Mapping[str, np.ndarray]]:
    """Return a request's queries: each has a batch of one of every input."""
    size = len(next(iter(inputs.values())))
    if size == 1:
        return [inputs]
    return [{name: rows[i : i + 1] for name, rows in inputs.items()} for i in range(size)]


def outcome_name(signature: Signature) -> str:
    """Return the name of the outcome's output, which a model's own output may have already."""
    taken = any(spec.name == OUTCOME for spec in signature.outputs)
    return f"codedinvnet.{OUTCOME}" if taken else OUTCOME


def failure(found: Sequence[Answered | QueryFailed]) -> QueryFailed:
    """Return the error of a request of which not every query was answered."""
    problems = [problem for problem in found if isinstance(problem, QueryFailed)]
    share = f"{len(problems)} of {len(found)} queries"
    for problem in problems:
        if isinstance(problem, InputRefused):
            return InputRefused(f"query {found.index(problem)}: {problem}")
    for problem in problems:
        if not isinstance(problem, DeadlinePassed):
            return QueryFailed(f"{share} failed: {problem}")
    late = [problem for problem in problems if isinstance(problem, DeadlinePassed)]
    last = next((problem for problem in reversed(late) if problem.failure), late[-1])
    return DeadlinePassed(f"{share}: deadline passed", last.failure, last.where)
