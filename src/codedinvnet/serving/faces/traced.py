"""Spans for requests, over HTTP and gRPC, before a service that is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codedinvnet.serving.tracing import Headers, Tracing

if TYPE_CHECKING:
    from codedinvnet.serving.faces.grpc import Backend

INTERNAL_ERROR = 500
FAULTS = frozenset({2, 4, 12, 13, 14, 15})
"""gRPC codes that tell of the server: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
UNAVAILABLE, DATA_LOSS."""


class TracedRequests:
    """Trace inference requests over HTTP; it stands before all other middleware."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not scope["path"].endswith("/infer"):
            await self.app(scope, receive, send)
            return
        status = INTERNAL_ERROR

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = ((k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"])
        about = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self.tracing.request(f"{scope['method']} infer", headers, about) as request:
            try:
                await self.app(scope, receive, seen)
            finally:
                request.span.set_attribute("http.response.status_code", status)
                if status >= INTERNAL_ERROR:
                    request.failed(f"HTTP status {status}")


@dataclass
class TracedBackend:
    """Traces inference requests over gRPC.

    Attributes:
        backend: answers them.
        tracing: makes the spans.
    """

    backend: Backend
    tracing: Tracing

    @property
    def is_live(self) -> bool:
        """See `Backend`."""
        return self.backend.is_live

    @property
    def is_ready(self) -> bool:
        """See `Backend`."""
        return self.backend.is_ready

    async def metadata(self, model: str, version: str) -> Mapping[str, Any]:
        return await self.backend.metadata(model, version)

    async def infer(
        self,
        message: bytes,
        seconds: float | None,
        headers: Headers,
        hold: Callable[[int], None],
    ) -> tuple[bytes, Headers]:
        from codedinvnet.serving.faces.grpc import problem

        about = {"rpc.system": "grpc", "rpc.method": "ModelInfer"}
        with self.tracing.request("ModelInfer", headers, about) as request:
            code = 0
            try:
                return await self.backend.infer(message, seconds, headers, hold)
            except Exception as error:
                refused = problem(error, "ModelInfer")
                code = refused.code
                if code in FAULTS:
                    request.failed(refused.message)
                raise refused from error
            finally:
                request.span.set_attribute("rpc.grpc.status_code", code)


def traced(backend: Backend, tracing: Tracing | None) -> Backend:
    """Return a backend whose requests are traced, if any are."""
    return backend if tracing is None else TracedBackend(backend, tracing)
