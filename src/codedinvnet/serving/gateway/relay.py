"""Answers calls through the front end.

It looks into them only for what must not be sent twice, and where a small backup must read them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.scheduler.settings import MAX_BATCH
from codedinvnet.serving.answers import BadRequest, DeadlinePassed, QueryFailed
from codedinvnet.serving.background import in_thread
from codedinvnet.serving.faces.http import LARGE_BODY
from codedinvnet.serving.faces.v2 import short
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.gateway.backup import SCORES
from codedinvnet.serving.gateway.calls import Call, Headers, Reply, Transport
from codedinvnet.serving.gateway.pool import CALL, REPLY, UpstreamPool, boxed
from codedinvnet.serving.gateway.understanding import Understanding
from codedinvnet.serving.gateway.unrepeatable import Unrepeatable, check_repeatable
from codedinvnet.serving.listening import body_limit
from codedinvnet.serving.logs import LASTING, Quiet
from codedinvnet.serving.service import AGREEMENT, LIMIT, Request, Service

if TYPE_CHECKING:
    from torch import Tensor

FAILED = "failed"
"""The outcome of an answer by which the last upstream failed."""


@dataclass(frozen=True)
class PassThrough:
    """A model that the gateway knows by name alone: a query is a call, its answer a reply."""

    name: str

    signature = Signature((TensorSpec(CALL, "BYTES", ()),), (TensorSpec(REPLY, "BYTES", ()),))
    decoded: tuple[str, ...] = ()
    kind = "logits"
    image_shape = None

    def datatypes(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Return the one datatype that there is."""
        return (tensor.datatype,)

    def incompatibility(self, tensor: TensorSpec, values: np.ndarray) -> str:
        """Return "": nothing is looked into."""
        return ""

    def joined(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return the calls of a task."""
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def answer(self, scores: Tensor) -> list[Mapping[str, np.ndarray]]:
        """Return no outputs: a reply is the upstream's own."""
        return [{} for _ in scores]


class Answer(NamedTuple):
    """A reply, and what is told with it."""

    reply: Reply
    outcome: str
    """How it came about."""
    told: Mapping[str, float] = {}
    """Parameters besides the outcome: the limit that stood, and how likely it is to agree."""


class Relay:
    """Passes calls on to upstreams.

    Args:
        front: sends calls to the pool's workers.
        pool: the upstreams.
        understanding: reads requests for a small backup; None without one.
        service: answers in the relay's place where a code mixes queries.
        most: bytes that a body may have unpacked.
    """

    def __init__(
        self,
        front: FrontEnd,
        pool: UpstreamPool,
        understanding: Understanding | None = None,
        service: Service | None = None,
        *,
        most: int,
    ) -> None:
        self.front, self.pool, self.most = front, pool, most
        self.understanding, self.service = understanding, service
        pool.on_late = front.late
        # Reading what is large holds the interpreter for a while, and takes memory.
        self._large = asyncio.Semaphore(1)
        self._unanswered = Quiet(LASTING)

    @property
    def is_ready(self) -> bool:
        """Whether calls are taken."""
        return self.front.ready and self.front.scheduler.workers_up > 0

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
        hold: Callable[[int], None] = lambda _: None,
        url_query: str = "",
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
            hold: is told how many bytes the request holds, as a body and as tensors, and may raise.
            url_query: see `Call`.

        Raises:
            BadRequest: if it must not be sent twice.
            DeadlinePassed: if none answered in time.
            QueryFailed: if all that were asked failed, and said nothing; or if nobody waits for it
                any more.
            NotNow: see `FrontEnd.check_room`.
        """
        check_repeatable(transport, body, headers)
        began = time.monotonic() if began is None else began
        limit = self.front.deadline if seconds is None else min(self.front.deadline, seconds)
        until = began + limit
        call = Call(
            self.pool.model,
            version,
            transport,
            body,
            headers,
            until,
            most=self.most,
            url_query=url_query,
        )
        accepts = await self._read(call, gone)
        if gone is not None and gone.done():
            raise QueryFailed("cancelled")
        call.backed = self._backed() if accepts else None
        hold(call.size)
        query, request = {CALL: boxed(call)}, call.request
        try:
            (found,) = await self.front.infer(
                [query],
                accept_decoded=accepts,
                deadline=limit,
                began=began,
                gone=gone,
                name=None if request is None else request.name,
                limit=None if request is None else request.max_disagreement,
                bulk=len(body).bit_length(),
            )
        finally:
            call.finish()
        if not isinstance(found, QueryFailed):
            told = self._told(request, found.agreement)
            if REPLY in found.outputs:
                return Answer(found.outputs[REPLY][0], found.outcome, told)
            assert self.understanding is not None
            assert request is not None
            (scores,) = found.outputs[SCORES]
            return Answer(self.understanding.reply(call, request, scores), found.outcome, told)
        if call.refusal is None or isinstance(found, DeadlinePassed):
            raise found
        return Answer(call.refusal, FAILED)

    async def _read(self, call: Call, gone: asyncio.Future[Any] | None) -> bool:
        """Unpack a call, and read it for the backup, if need be; return whether that may answer.

        What is not understood is for the upstreams alone to judge. What is large or packed is read
        in a thread, one request at a time.

        Raises:
            Unrepeatable: if it must not be sent twice, which may show once it is unpacked.
        """
        translated = call.encoding is not None and self.pool.translates
        if self.understanding is None and not translated:
            return True
        if self.understanding is not None and not translated:
            call.most = body_limit(self.understanding.served, MAX_BATCH, self.most)
        try:
            if call.encoding is None and len(call.body) < LARGE_BODY:
                return self._accepts(call, call.body)
            async with self._large:
                if (gone is not None and gone.done()) or time.monotonic() > call.deadline:
                    return False  # nobody waits for it any more
                body = await call.unpacked()
                return await in_thread(lambda: self._accepts(call, body))
        except Unrepeatable:
            raise
        except BadRequest as error:
            if self.understanding is not None:
                told = "the small backup does not answer"
                self._unanswered.log(told, logging.WARNING, reason=str(error))
            return False
        finally:
            if not translated:
                call.plain, call.most = None, self.most

    def _accepts(self, call: Call, body: bytes) -> bool:
        """Read a call for the backup, if there is one; return whether that may answer.

        Raises:
            BadRequest: if it is not understood, or asks for more than the backup has.
            Unrepeatable: see `_read`.
        """
        if call.encoding is not None:
            check_repeatable(call.transport, body, call.headers)
        if self.understanding is None:
            return True
        if not self.pool.is_protected:
            return False
        request = self.understanding.request(call, body)
        if not request.unknown:  # otherwise an upstream's answer is nothing to compare with
            call.request = request
        if not request.accept_decoded:
            return False
        if request.max_disagreement is not None and self._limit is None:
            return False  # a limit that nobody keeps is kept by the model's own answer alone
        if request.unknown:
            told = short(", ".join(request.unknown))
            raise BadRequest(f"parameters: {told}: the model's own server may know them")
        if lacking := self.understanding.lacking(request):
            scores = self.understanding.scores.name
            raise BadRequest(f"outputs: it lacks {', '.join(lacking)}: name {scores} alone")
        return True

    def _backed(self) -> float | None:
        """Return in how many seconds the small backup is asked about a lost call; None: it is not.

        It may be down, or the policy may go without it.
        """
        front, mains = self.front, len(self.pool.places)
        rules, policy = front.rules, front.scheduler.policy
        if not any(map(front.scheduler.is_up, range(mains, rules.workers))):
            return None
        if policy.coded:
            return rules.group_timeout
        return 0.0 if policy.backs_late else None

    @property
    def _limit(self) -> float | None:
        return None if self.front.reliance is None else self.front.reliance.limit

    def _told(self, request: Request | None, agreement: float | None) -> dict[str, float]:
        """Return what is told with an answer besides its outcome."""
        told = {} if agreement is None else {AGREEMENT: agreement}
        asked = None if request is None else request.max_disagreement
        if asked is not None and self.front.reliance is not None:
            kept = self.front.reliance.kept(asked)
            if kept is not None:
                told[LIMIT] = kept
        return told
