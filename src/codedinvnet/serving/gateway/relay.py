"""Answers calls through the front end, without a look into them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.serving.answers import DeadlinePassed, QueryFailed
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.gateway.calls import Call, Headers, Reply, Transport
from codedinvnet.serving.gateway.pool import CALL, REPLY, UpstreamPool, boxed

FAILED = "failed"
"""The outcome of an answer by which the last upstream failed."""


@dataclass(frozen=True)
class PassThrough:
    """A model that the gateway knows by name alone: a query is a call, its answer a reply."""

    name: str

    signature = Signature((TensorSpec(CALL, "BYTES", ()),), (TensorSpec(REPLY, "BYTES", ()),))
    decoded: tuple[str, ...] = ()
    kind = "logits"
    classes: tuple[str, ...] = ()
    image_shape = None

    def datatypes(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Return the one datatype that there is."""
        return (tensor.datatype,)

    def flaw(self, tensor: TensorSpec, values: np.ndarray) -> str:
        """Return "": nothing is looked into."""
        return ""

    def joined(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return the one call of a task."""
        return rows[0]

    def answer(self, scores: Tensor) -> list[Mapping[str, np.ndarray]]:
        """Nothing is decoded here."""
        raise NotImplementedError


class Answer(NamedTuple):
    """A reply and how it came about."""

    reply: Reply
    outcome: str


class Relay:
    """Passes calls on to upstreams.

    Args:
        front: sends calls to the pool's workers.
        pool: the upstreams.
    """

    def __init__(self, front: FrontEnd, pool: UpstreamPool) -> None:
        self.front, self.pool = front, pool

    @property
    def is_ready(self) -> bool:
        """Whether calls are taken."""
        return self.front.ready and any(place.up for place in self.pool.places)

    async def answer(
        self,
        version: str,
        transport: Transport,
        body: bytes,
        headers: Headers,
        *,
        began: float | None = None,
        seconds: float | None = None,
        gone: asyncio.Future[Any] | None = None,
    ) -> Answer:
        """Return what an upstream says to a request.

        Args:
            version: of the model; "" if the client did not say.
            transport: see `Call`.
            body: likewise.
            headers: likewise.
            began: when the request came (`time.monotonic()`); None: now.
            seconds: until the client waits no longer; at most the gateway's own deadline.
            gone: see `FrontEnd.infer`.

        Raises:
            DeadlinePassed: if none answered in time.
            QueryFailed: if all that were asked failed, and said nothing.
            Overloaded, Draining, Starting: see `FrontEnd.check_room`.
        """
        began = time.monotonic() if began is None else began
        limit = min(self.front.deadline, seconds or self.front.deadline)
        call = Call(self.pool.model, version, transport, body, headers, began + limit)
        query = {CALL: boxed(call)}
        try:
            (found,) = await self.front.infer([query], deadline=limit, began=began, gone=gone)
        finally:
            call.finish()
        if not isinstance(found, QueryFailed):
            return Answer(found.outputs[REPLY][0], found.outcome)
        if call.refusal is None or isinstance(found, DeadlinePassed):
            raise found
        return Answer(call.refusal, FAILED)
