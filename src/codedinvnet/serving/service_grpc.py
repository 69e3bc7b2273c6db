"""A served model behind the gRPC face."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from codedinvnet.serving.background import in_thread
from codedinvnet.serving.bodies import read_in_turn
from codedinvnet.serving.faces.grpc import Headers, Refused
from codedinvnet.serving.faces.grpc_stubs import grpc
from codedinvnet.serving.faces.http import LARGE_ANSWER, LARGE_BODY
from codedinvnet.serving.faces.v2 import (
    OUTCOME_HEADER,
    VERSION,
    model_metadata,
    parse_request,
    render_response,
    short,
)
from codedinvnet.serving.faces.v2_grpc import request_to_http, response_from_http
from codedinvnet.serving.served import OUTCOME
from codedinvnet.serving.service import Request, Service


class ServiceBackend:
    """Answers messages as the same requests would be answered over HTTP, in binary.

    Args:
        service: answers requests.
        max_batch: queries of a request.
        large: is had by what reads or writes something large, over another face as well.
    """

    def __init__(self, service: Service, max_batch: int, large: asyncio.Semaphore) -> None:
        self.service, self.max_batch, self.large = service, max_batch, large

    @property
    def is_live(self) -> bool:
        """Whether a worker is up, or may come back."""
        return self.service.front.supervisor.is_live

    @property
    def is_ready(self) -> bool:
        """Whether queries are taken."""
        front = self.service.front
        return front.ready and front.scheduler.workers_up > 0

    def _check(self, model: str, version: str) -> None:
        name = self.service.served.name
        if model != name or version not in ("", VERSION):
            asked = f"{short(model)} version {short(version or VERSION)}"
            told = f"no model {asked}; there is {name!r} 1"
            raise Refused(grpc.StatusCode.NOT_FOUND.value[0], told)

    def _parsed(self, message: bytes) -> Request:
        body, model, version = request_to_http(message)
        self._check(model, version)
        length = None if body.header_length is None else str(body.header_length)
        return parse_request(body.data, length, self.service.served, self.max_batch)

    async def metadata(self, model: str, version: str) -> Mapping[str, Any]:
        self._check(model, version)
        return model_metadata(self.service.served)

    async def infer(
        self,
        message: bytes,
        seconds: float | None,
        headers: Headers,
        hold: Callable[[int], None],
    ) -> tuple[bytes, Headers]:
        began, front = time.monotonic(), self.service.front
        front.check_room(1)

        def parse() -> Request:
            return self._parsed(message)

        if len(message) < LARGE_BODY:
            request = parse()
        else:
            request = await read_in_turn(self.large, front, parse, began)
        hold(len(message) + request.size)
        if seconds is not None:
            request = request.within(seconds)
        answer = await self.service.answer(request, began=began)
        outcome = answer.parameters.get(OUTCOME)
        trailers: Headers = () if outcome is None else ((OUTCOME_HEADER, outcome),)

        def write() -> bytes:
            data, head = render_response(request, answer, self.service.served)
            return response_from_http(data, None if head is None else str(head))

        if answer.values < LARGE_ANSWER:
            return write(), trailers
        async with self.large:
            return await in_thread(write), trailers
