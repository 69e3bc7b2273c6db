"""An upstream that is reached over gRPC: messages are passed on unparsed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Any

from codedinvnet.serving.background import Background
from codedinvnet.serving.faces.grpc_stubs import SERVICE, grpc, pb
from codedinvnet.serving.faces.statuses import http_status
from codedinvnet.serving.gateway.calls import (
    LARGEST,
    OK,
    Call,
    Headers,
    NoFiles,
    Reply,
    Unreachable,
    lacks_files,
    problem,
)
from codedinvnet.serving.gateway.http_client import OLDEST
from codedinvnet.serving.gateway.outcome import own_outcome
from codedinvnet.serving.gateway.translation import through_grpc
from codedinvnet.serving.gateway.upstreams import OwnHeaders, no_metadata
from codedinvnet.serving.workers.pool import SILENT

INFER = "ModelInfer"
"""The method of calls that take time; the others are questions."""
UNREACHABLE = frozenset({"UNAVAILABLE"})
"""Codes that say that there was no connection, unless the upstream has sent them itself."""
BROKEN = ("Socket closed", "onnection reset", "recvmsg", "GOAWAY")
"""By what words gRPC tells that a connection broke while a call was under way."""
LEEWAY = 0.05
"""Seconds before its time is over from which on DEADLINE_EXCEEDED is gRPC's own word for silence;
sooner it is the upstream's."""
LONGEST = 86_400.0
"""Seconds for which gRPC may be told to try."""
CLOSED = "its connection was closed"
"""Why there is no answer from an upstream that was removed."""
OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # over HTTP the environment's is not used either
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_metadata_size", 1 << 20),  # an error's text is among them; 8 KB is the default
)


def connecting_within(seconds: float | None) -> tuple[tuple[str, int], ...]:
    """Return the channel's options that limit how long one try to connect may take.

    gRPC calls that the least time between two tries, and 0.1 s is the least that it takes.
    """
    if seconds is None:
        return ()
    return (("grpc.min_reconnect_backoff_ms", math.ceil(1000 * min(seconds, LONGEST))),)


class Connection:
    """A channel, and how many calls are under way over it.

    Args:
        channel: over which nothing was asked yet.
    """

    def __init__(self, channel: Any) -> None:
        self.channel, self.calls = channel, 0
        self.made = time.monotonic()
        self._quiet = asyncio.Event()

    def ended(self) -> None:
        """Take down that a call has ended."""
        self.calls -= 1
        self._quiet.set()

    async def end(self) -> None:
        """Close it when its calls have ended: their time is limited. If cancelled, close it now."""
        try:
            while self.calls:
                self._quiet.clear()
                await self._quiet.wait()
        finally:
            await self.channel.close()


class GrpcUpstream:
    """A server that is reached over gRPC.

    Args:
        url: as the user gave it.
        target: its host and port.
        secure: whether over TLS.
        roots: certificates to trust, PEM; None: those that gRPC carries.
        own: headers for all that it is asked.
        connect: seconds in which a connection must be there; None: gRPC's own 20.
        certified: the name that its certificate must have; "": its host's.
    """

    stops = translates = True
    tries = 1

    def __init__(
        self,
        url: str,
        target: str,
        secure: bool,
        roots: bytes | None,
        own: OwnHeaders,
        connect: float | None = None,
        certified: str = "",
    ) -> None:
        self.url, self.target, self.secure, self.roots, self.own = url, target, secure, roots, own
        named = (("grpc.ssl_target_name_override", certified),) if certified else ()
        most = ("grpc.max_receive_message_length", LARGEST)
        self._options = (*OPTIONS, most, *connecting_within(connect), *named)
        self._connection: Connection | None = None
        self._questions: set[Any] = set()
        """Calls that ask for no inference."""
        self._ending = Background()
        """Connections that are used no more, and end."""
        self._closed = False

    def _connected(self) -> Connection:
        """Return its connection, or make one; in the event loop that first asks."""
        if self._connection is not None and time.monotonic() - self._connection.made >= OLDEST:
            self._leave()
        if self._connection is None:
            if self.secure:
                credentials = grpc.ssl_channel_credentials(self.roots)
                channel = grpc.aio.secure_channel(self.target, credentials, self._options)
            else:
                channel = grpc.aio.insecure_channel(self.target, self._options)
            self._connection = Connection(channel)
        return self._connection

    def _leave(self) -> None:
        """Ask nothing more over the connection; it ends when its calls have."""
        if self._connection is not None:
            self._ending.spawn(self._connection.end())
            self._connection = None

    def _doubt(self, connection: Connection) -> None:
        """Make another connection, if the one is there over which a question had no answer.

        It may be dead without a word: the kernel tries on for a quarter of an hour. Pings would
        find that out, too, but Triton closes connections that send many.
        """
        is_there = connection.channel.get_state() is grpc.ChannelConnectivity.READY
        if is_there and connection is self._connection:
            self._leave()

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
        connection, call = self._connected(), None
        ask = connection.channel.unary_unary(f"/{SERVICE}/{method}")
        connection.calls += 1
        began = time.monotonic()
        try:
            call = ask(message, timeout=seconds, metadata=self.own.beside(headers))
            if method != INFER:
                self._questions.add(call)
            body = await call
            told = own_outcome(await call.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            name, code = error.code().name, error.code().value[0]
            reply = Reply("grpc", code, message=error.details() or "")
            if name in UNREACHABLE and lacks_files():  # perhaps for a connection
                raise NoFiles from error
            if name in UNREACHABLE:
                sent = any(words in reply.message for words in BROKEN)
                raise Unreachable(reply.message or name, reply, sent) from error
            if name == "DEADLINE_EXCEEDED" and time.monotonic() - began >= seconds - LEEWAY:
                if method != INFER:
                    self._doubt(connection)
                raise Unreachable(f"{SILENT} {seconds:.3g} s") from error
            return reply
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            # gRPC cancels what is asked over a channel that is closed, and so would its asker be.
            if not self._closed or getattr(asyncio.current_task(), "cancelling", int)():
                raise
            raise Unreachable(CLOSED) from error
        finally:
            self._questions.discard(call)
            connection.ended()
        return Reply("grpc", OK["grpc"], body, told)

    async def infer(self, call: Call, seconds: float) -> Reply:
        async def post(message: bytes, headers: Headers) -> Reply:
            return await self._ask(INFER, message, seconds, headers)

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

    async def close(self, grace: float | None = 0.0) -> None:
        self._closed = True
        for question in tuple(self._questions):
            question.cancel()
        self._leave()
        await self._ending.wait(grace)
        await self._ending.stop()
