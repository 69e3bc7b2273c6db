"""The gateway behind the gRPC face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.grpc import Refused
from codedinvnet.serving.faces.statuses import grpc_status
from codedinvnet.serving.faces.v2 import OUTCOME_HEADER, short
from codedinvnet.serving.gateway.calls import (
    OK,
    Headers,
    NotProtocol,
    Unreachable,
    model_of,
)
from codedinvnet.serving.gateway.outcome import outcome_field, own_outcome
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.versions import check_version

NOT_FOUND, UNAVAILABLE = grpc_status(404), grpc_status(503)


class RelayBackend:
    """Passes messages on to upstreams.

    Args:
        relay: answers calls.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self._fields: dict[str, bytes] = {}

    @property
    def is_live(self) -> bool:
        """Whether an upstream is up, or may come back."""
        return self.relay.front.supervisor.is_live

    @property
    def is_ready(self) -> bool:
        """Whether calls are taken."""
        return self.relay.is_ready

    def _check(self, model: str, version: str) -> None:
        if model != self.relay.pool.model:
            told = f"no model {short(model)}; there is {self.relay.pool.model!r}"
            raise Refused(NOT_FOUND, told)
        check_version(version)

    async def metadata(self, model: str, version: str) -> Mapping[str, Any]:
        self._check(model, version)
        try:
            return await self.relay.pool.model_metadata(version)
        except NotProtocol as error:
            raise Refused(NOT_FOUND, str(error)) from error
        except Unreachable as error:
            raise Refused(UNAVAILABLE, str(error)) from error

    async def infer(
        self,
        message: bytes,
        seconds: float | None,
        headers: Headers,
        hold: Callable[[int], None],
    ) -> tuple[bytes, Headers]:
        try:
            model, version = model_of(message)
        except ValueError as error:  # of text that is no UTF-8, too
            raise BadRequest(f"ModelInferRequest: {error}") from error
        self._check(model, version)
        reply, outcome, told = await self.relay.answer(
            version, "grpc", message, headers, seconds=seconds, hold=hold
        )
        theirs = own_outcome(reply.headers)
        trailers: Headers = theirs or ((OUTCOME_HEADER, outcome),)
        if reply.status != OK["grpc"]:
            raise Refused(reply.status, reply.message, trailers)
        if theirs:  # another gateway's answer tells it already
            return reply.body, trailers
        if told:
            return reply.body + outcome_field(outcome, told), trailers
        if outcome not in self._fields:
            self._fields[outcome] = outcome_field(outcome)
        return reply.body + self._fields[outcome], trailers
