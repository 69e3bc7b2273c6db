"""The protocol over gRPC: GRPCInferenceService, and the standard health check."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from codedinvnet.common.errors import UserError
from codedinvnet.net.grpc import (
    INT_MAX,
    Calls,
    Turns,
    grpc,
    renewed_credentials,
    server_settings,
    settings,
)  # fmt: skip
from codedinvnet.net.guard import NEEDED, Guard
from codedinvnet.net.http1 import MOST_HEAD
from codedinvnet.net.logs import log_event
from codedinvnet.net.protocol import grpc as protocol
from codedinvnet.net.protocol.grpc import SERVICE, pb
from codedinvnet.net.protocol.messages import Head, InferRequest, ProtocolError, server_metadata
from codedinvnet.net.tls import Certificate
from codedinvnet.serving.api.bodies import LARGE, BodyMemory
from codedinvnet.serving.api.errors import LEFT, Problem, TooSlow, Unauthenticated, problem
from codedinvnet.serving.api.http import LARGE_ANSWER
from codedinvnet.serving.service import InferenceService
from codedinvnet.serving.tracing import Tracing

HEALTH, CHECK = "grpc.health.v1.Health", "Check"
"""The service by which Kubernetes, Envoy and others ask servers over gRPC whether they are ready,
and its one method here."""
HEALTHY, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""Its answers, serialized."""
OPEN = frozenset({"ServerLive", "ServerReady", "ModelReady", CHECK})
"""Methods that need no token."""
WITH_MESSAGE = frozenset({"ModelReady", "ModelMetadata", "ModelInfer"})
"""Methods whose messages say something; others' are not read."""
FEWEST_READ = 32
"""Messages that are read at once, at least, however long they may be."""
LONGEST_CONNECTION = 600.0
"""Seconds after which a connection takes no more requests; its client opens another."""
LAST_REQUESTS = 60.0
"""Seconds, and twice the deadline, in which a client must have the last answers on it."""
LONGEST_MESSAGE = 2048
"""Bytes of an error's message. Clients take 8 KB of metadata, and three for some bytes."""
TOO_LATE = 504
"""The HTTP status of a request whose time was over."""
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE"})
"""Codes that tell of the server."""


class GrpcApi:
    """A gRPC server.

    It checks the token before it reads the message. It reads as many messages at once as the memory
    has room for, at least `FEWEST_READ`; of others gRPC takes `WINDOW` bytes, and clients wait.
    """

    def __init__(
        self,
        service: InferenceService,
        memory: BodyMemory,
        guard: Guard,
        tracing: Tracing | None = None,
    ) -> None:
        self.service, self.memory, self.tracing = service, memory, tracing
        self.dispatcher, self.guard = service.dispatcher, guard
        self.max_message = service.limits.body
        turns = max(FEWEST_READ, memory.most // max(1, self.max_message))
        self._turns, self._strangers_turns = Turns(turns, memory, 0), Turns(1, memory, 0)
        self._calls = Calls(memory)
        self._deadline = self.dispatcher.timing.deadline

    @asynccontextmanager
    async def listening(
        self, host: str, port: int, certificate: Certificate | None = None
    ) -> AsyncIterator[int]:
        """Serve while the body runs; yields the port.

        Raises:
            UserError: if the address is taken or not ours.
        """
        last = LAST_REQUESTS + 2 * self._deadline
        options = {
            **server_settings(self.max_message),
            "max_connection_age_ms": round(1000 * LONGEST_CONNECTION),
            "max_connection_age_grace_ms": min(round(1000 * last), INT_MAX),
        }
        served = grpc.aio.server(options=settings(**options))
        served.add_generic_rpc_handlers(self._handlers())
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound: int
            if certificate is None:
                bound = served.add_insecure_port(address)
            else:
                bound = served.add_secure_port(address, renewed_credentials(certificate))
        except RuntimeError as error:
            raise UserError(f"--grpc-port: cannot listen on {address}") from error
        await served.start()
        log_event("gRPC", host=host, port=bound)
        try:
            yield bound
        finally:
            await served.stop(self._deadline)

    def _handlers(self) -> tuple[Any, ...]:
        answers: dict[str, Callable[[bytes, Any], Awaitable[bytes]]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        # gRPC reads nothing of a stream before the handler does; a stream of one message is the
        # same request.
        unary = grpc.stream_unary_rpc_method_handler
        handlers = {name: unary(self._guarded(name, answer)) for name, answer in answers.items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._no_stream)
        health = {CHECK: unary(self._guarded(CHECK, self._health))}
        make = grpc.method_handlers_generic_handler
        return make(SERVICE, handlers), make(HEALTH, health)

    def _guarded(
        self, name: str, answer: Callable[[bytes, Any], Awaitable[bytes]]
    ) -> Callable[[Any, Any], Awaitable[bytes]]:
        """Return a handler that checks the token, reads the message, and maps errors to codes."""
        is_open = name in OPEN
        turns = self._strangers_turns if is_open and self.guard.token.text else self._turns

        def count(status: int) -> None:
            if name == "ModelInfer":
                self.dispatcher.metrics.requests.labels(str(status)).inc()

        async def guarded(_: Any, context: Any) -> bytes:
            message = b""
            try:
                given = dict(context.invocation_metadata() or ()).get("authorization", "")
                is_known = not is_open and self.guard.is_right(str(given).encode())
                if not self._calls.admit(context, is_known):
                    self.dispatcher.refuse(1)
                if not (is_open or is_known):
                    raise Unauthenticated(NEEDED)
                if name in WITH_MESSAGE:
                    message = await read_message(context, turns, self._deadline)
                    if name != "ModelInfer" and len(message) > MOST_HEAD:
                        most = MOST_HEAD // 1024
                        raise ProtocolError(f"message: more than {most} KiB")
                found = await answer(message, context)
            except Exception as error:
                refused = problem(error, f"/{SERVICE}/{name}")
            except asyncio.CancelledError:
                left = context.time_remaining()
                count(LEFT if left is None or left > 0 else TOO_LATE)
                raise
            else:
                count(200)
                self._calls.answered(context, len(found))
                return found
            count(refused.http)
            await self._calls.abort(context, grpc.StatusCode[refused.grpc], cut(refused.message))
            raise AssertionError

        return guarded

    async def _live(self, _: bytes, __: Any) -> bytes:
        live = self.dispatcher.supervisor.is_live
        return protocol.serialized(pb.ServerLiveResponse(live=live))

    async def _health(self, _: bytes, __: Any) -> bytes:
        return HEALTHY if self.dispatcher.is_up else NOT_SERVING

    async def _ready(self, _: bytes, __: Any) -> bytes:
        return protocol.serialized(pb.ServerReadyResponse(ready=self.dispatcher.is_up))

    async def _model_ready(self, message: bytes, _: Any) -> bytes:
        wanted = protocol.parse(pb.ModelReadyRequest, message)
        self.service.check_model(wanted.name, wanted.version)
        return protocol.serialized(pb.ModelReadyResponse(ready=self.dispatcher.is_up))

    async def _server_metadata(self, _: bytes, __: Any) -> bytes:
        found = server_metadata(version("codedinvnet"))
        return protocol.serialized(pb.ServerMetadataResponse(**found))

    async def _model_metadata(self, message: bytes, _: Any) -> bytes:
        wanted = protocol.parse(pb.ModelMetadataRequest, message)
        self.service.check_model(wanted.name, wanted.version)
        return protocol.render_metadata(self.service.metadata)

    async def _infer(self, message: bytes, context: Any) -> bytes:
        if self.tracing is None:
            return await self._answer(message, context.time_remaining())
        names = [(k, v) for k, v in context.invocation_metadata() or () if isinstance(v, str)]
        about = {"rpc.system": "grpc", "rpc.method": "ModelInfer"}
        with self.tracing.request("ModelInfer", names, about) as span:
            found: Problem | None = None
            try:
                return await self._answer(message, context.time_remaining())
            except Exception as error:
                found = problem(error, f"/{SERVICE}/ModelInfer")
                raise
            finally:
                code = "OK" if found is None else found.grpc
                number = grpc.StatusCode[code].value[0]
                span.span.set_attribute("rpc.grpc.status_code", number)
                if found is not None and code in FAULTS:
                    span.failed(found.message)

    async def _answer(self, message: bytes, seconds: float | None) -> bytes:
        began, service = time.monotonic(), self.service
        self.dispatcher.check_room(1)

        def check(head: Head) -> None:
            service.check_model(*head.model)
            service.check(head)

        def parse() -> InferRequest:
            return protocol.parse_request(message, check)

        with self.memory.holding() as hold:
            hold(len(message))
            if len(message) < LARGE:
                request = parse()
            else:
                request = await self.memory.parse(parse, began)
            hold(max(len(message), request.size))
            answer = await service.answer(request, began, seconds=seconds)
        if answer.values < LARGE_ANSWER:
            return protocol.render_response(answer.message)
        return await self.memory.write(lambda: protocol.render_response(answer.message))

    async def _no_stream(self, _: Any, context: Any) -> None:
        why = "ModelStreamInfer is not supported: send each request by ModelInfer"
        self._calls.admit(context, False)
        await self._calls.abort(context, grpc.StatusCode.UNIMPLEMENTED, why)


async def read_message(context: Any, turns: Turns, seconds: float) -> bytes:
    """Return a request's message, which must be here in so many seconds.

    Raises:
        TooSlow: if it is not.
        ProtocolError: if there is none.
    """
    try:
        message = await turns.read(context, seconds)
    except TimeoutError as error:
        raise TooSlow(f"message: {str(error) or f'not here after {seconds:g} s'}") from None
    if not isinstance(message, bytes):
        raise ProtocolError("message: there is none")
    return message


def cut(message: str) -> str:
    """Return a message, or the beginning of one that clients would not take."""
    encoded = message.encode()
    if len(encoded) <= LONGEST_MESSAGE:
        return message
    return encoded[:LONGEST_MESSAGE].decode(errors="ignore") + "..."
