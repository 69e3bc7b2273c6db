"""An upstream that is reached over gRPC: messages are passed on unparsed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from codedinvnet.serving.faces.grpc_stubs import SERVICE, UNLIMITED, grpc, pb
from codedinvnet.serving.faces.statuses import http_status
from codedinvnet.serving.gateway.calls import (
    OK,
    Call,
    Headers,
    NoFiles,
    Reply,
    Unreachable,
    lacks_files,
    problem,
)
from codedinvnet.serving.gateway.translation import through_grpc
from codedinvnet.serving.gateway.upstreams import OwnHeaders, no_metadata

UNREACHABLE = frozenset({"UNAVAILABLE"})
"""Codes that say that there was no connection, unless the upstream has sent them itself."""
CLOSED = "its connection was closed"
"""Why there is no answer from an upstream that was removed."""
OPTIONS = (
    *UNLIMITED,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_metadata_size", 1 << 20),  # an error's text is among them; 8 KB is the default
)


class GrpcUpstream:
    """A server that is reached over gRPC.

    Args:
        url: as the user gave it.
        target: its host and port.
        secure: whether over TLS.
        roots: certificates to trust, PEM; None: those that gRPC carries.
        own: headers for all that it is asked.
    """

    stops = translates = True
    tries = 1

    def __init__(
        self, url: str, target: str, secure: bool, roots: bytes | None, own: OwnHeaders
    ) -> None:
        self.url, self.target, self.secure, self.roots, self.own = url, target, secure, roots, own
        self._channel: Any = None
        self._closed = False

    @property
    def channel(self) -> Any:
        """Its connection; in the event loop that first asks."""
        if self._channel is None:
            if self.secure:
                credentials = grpc.ssl_channel_credentials(self.roots)
                self._channel = grpc.aio.secure_channel(self.target, credentials, OPTIONS)
            else:
                self._channel = grpc.aio.insecure_channel(self.target, OPTIONS)
        return self._channel

    async def _ask(
        self, method: str, message: bytes, seconds: float, headers: Headers = ()
    ) -> Reply:
        """Return the answer to a serialized message.

        Raises:
            Unreachable: if there is none in so many seconds, or maybe no connection.
            NoFiles: if that may be for want of files here.
        """
        if self._closed:
            raise Unreachable(CLOSED)
        ask = self.channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            body = await ask(message, timeout=seconds, metadata=self.own.beside(headers))
        except grpc.aio.AioRpcError as error:
            name, code = error.code().name, error.code().value[0]
            reply = Reply("grpc", code, message=error.details() or "")
            if name in UNREACHABLE and lacks_files():  # perhaps for a connection
                raise NoFiles from error
            if name in UNREACHABLE:
                raise Unreachable(reply.message or name, reply) from error
            if name == "DEADLINE_EXCEEDED":
                raise Unreachable(reply.message or name) from error
            return reply
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            # gRPC cancels what is asked over a channel that is closed, and so would its asker be.
            if not self._closed or getattr(asyncio.current_task(), "cancelling", int)():
                raise
            raise Unreachable(CLOSED) from error
        return Reply("grpc", OK["grpc"], body)

    async def infer(self, call: Call, seconds: float) -> Reply:
        async def post(message: bytes, headers: Headers) -> Reply:
            return await self._ask("ModelInfer", message, seconds, headers)

        if call.transport == "grpc":
            return self.own.taken(await post(call.body, call.headers))
        try:
            reply = await through_grpc(call, post)
        except Unreachable as error:
            if error.reply is not None:
                error.reply = problem(http_status(error.reply.status), error.reply.message)
            raise
        return self.own.taken(reply)

    async def is_ready(self, model: str, seconds: float) -> bool:
        request = pb.ModelReadyRequest(name=model).SerializeToString()
        reply = await self._ask("ModelReady", request, seconds)
        if told := self.own.refusal(reply):
            raise Unreachable(told)
        ready: bool = reply.status == 0 and pb.ModelReadyResponse.FromString(reply.body).ready
        return ready

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        request = pb.ModelMetadataRequest(name=model, version=version).SerializeToString()
        reply = await self._ask("ModelMetadata", request, seconds)
        if reply.status != OK["grpc"]:
            raise no_metadata(model, reply, self.own)
        found = pb.ModelMetadataResponse.FromString(reply.body)

        def tensors(messages: Any) -> list[dict[str, Any]]:
            return [
                {"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in messages
            ]

        return {
            "name": found.name,
            "versions": list(found.versions),
            "platform": found.platform,
            "inputs": tensors(found.inputs),
            "outputs": tensors(found.outputs),
        }

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None:
            await self._channel.close()
