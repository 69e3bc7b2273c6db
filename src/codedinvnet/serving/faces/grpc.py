"""The protocol over gRPC: GRPCInferenceService, before whatever answers requests.

Messages of requests are handed over as they came, serialized: the gateway passes them on unparsed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version as version_of
from typing import Any, Protocol

from prometheus_client import Counter

from codedinvnet.errors import UserError
from codedinvnet.serving.answers import (
    BadRequest,
    DeadlinePassed,
    NotNow,
    QueryFailed,
)
from codedinvnet.serving.bodies import BodyMemory, TooSlow
from codedinvnet.serving.faces import connections
from codedinvnet.serving.faces.grpc_stubs import SERVICE, UNLIMITED, grpc, pb
from codedinvnet.serving.faces.statuses import http_status
from codedinvnet.serving.faces.tls import Certificate, Renewal
from codedinvnet.serving.faces.v2 import server_metadata
from codedinvnet.serving.faces.v2_grpc import parsed
from codedinvnet.serving.logs import log_event

HEALTH, CHECK = "grpc.health.v1.Health", "Check"
"""The service by which Kubernetes, Envoy and others ask servers over gRPC whether they are ready,
and its one method here."""
HEALTHY, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""Its answers, serialized."""
OPEN = frozenset({"ServerLive", "ServerReady", "ModelReady", CHECK})
"""Methods that need no token."""
WITH_MESSAGE = frozenset({"ModelReady", "ModelMetadata", "ModelInfer"})
"""Methods whose messages say something; others' are not read."""
FEWEST_REQUESTS, MOST_REQUESTS = 64, 4096
"""Requests at once, whatever their size."""
WINDOW = 64 * 1024
"""Bytes that gRPC takes of a message that is not read yet."""
FEWEST_READ = 32
"""Messages that are read at once, at least, however long they may be."""
LONGEST_CONNECTION = 600.0
"""Seconds after which a connection takes no more requests; its client opens another."""
LAST_REQUESTS = 60.0
"""Seconds, beside twice the deadline, in which a client must have the last answers on it."""
LONGEST_TOLD = 2048
"""Bytes of an error's message. Clients take 8 KB of metadata, and three for some bytes."""
LEFT, TOO_LATE = 499, 504
"""The HTTP statuses of a request whose client had left, and of one whose time was over."""
INT_MAX = 2**31 - 1
"""The largest number that an option of gRPC may be."""
Headers = tuple[tuple[str, str], ...]


class Refused(Exception):
    """A request ends with an error of gRPC.

    Args:
        code: its number.
        message: what is wrong; it is cut off if it is long.
        trailers: metadata behind the answer.
    """

    def __init__(self, code: int, message: str, trailers: Headers = ()) -> None:
        super().__init__(message)
        self.code, self.message, self.trailers = code, cut(message), trailers


def cut(message: str) -> str:
    """Return a message, or the beginning of one that clients would not take."""
    data = message.encode(errors="replace")
    if len(data) <= LONGEST_TOLD:
        return message
    return data[:LONGEST_TOLD].decode(errors="ignore") + "..."


class Backend(Protocol):
    """What answers requests behind the face."""

    @property
    def is_live(self) -> bool:
        """Whether the server is alive."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""

    async def metadata(self, model: str, version: str) -> Mapping[str, Any]:
        """Return a model's metadata as over HTTP; the name "" stands for none.

        Raises:
            Refused: if there is no such model.
        """

    async def infer(
        self,
        message: bytes,
        seconds: float | None,
        headers: Headers,
        hold: Callable[[int], None],
    ) -> tuple[bytes, Headers]:
        """Return a serialized ModelInferResponse, and metadata behind it.

        Args:
            message: a serialized ModelInferRequest.
            seconds: for how long the client waits; None if it does not say.
            headers: the client's metadata.
            hold: is told how many bytes the request holds, as a message and as tensors, and may
                raise.

        Raises:
            Refused: if the answer is an error.
            BadRequest, QueryFailed, NotNow: see `Service.answer`.
        """


CODES: Mapping[type[Exception], str] = {
    BadRequest: "INVALID_ARGUMENT",
    DeadlinePassed: "DEADLINE_EXCEEDED",
    TooSlow: "DEADLINE_EXCEEDED",
    QueryFailed: "INTERNAL",
    NotNow: "UNAVAILABLE",
}
BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def problem(error: Exception, method: str) -> Refused:
    """Return an error of the service as gRPC's; one of its own is logged with the method."""
    if isinstance(error, Refused):
        return error
    kind = next((kind for kind in CODES if isinstance(error, kind)), None)
    if kind is None:
        reason = f"{type(error).__name__}: {error}"
        log_event(
            "internal error", logging.ERROR, error, path=f"/{SERVICE}/{method}", reason=reason
        )
        return Refused(grpc.StatusCode.INTERNAL.value[0], f"internal error: {type(error).__name__}")
    told = f"{error}: try again later" if kind is NotNow else str(error)
    return Refused(grpc.StatusCode[CODES[kind]].value[0], told)


class GrpcFace:
    """A gRPC server.

    A token is looked at before the message is read. So many messages are read at once as the memory
    has room for, `FEWEST_READ` at least; of others gRPC takes `WINDOW` bytes, and clients wait.

    Args:
        backend: answers requests.
        memory: bounds the bytes of all requests that are here.
        requests: counts inference requests by the HTTP status that means what they got.
        token: clients must send it as `authorization: Bearer TOKEN` ("": none).
        max_message: bytes of a request; None: those of all.
    """

    def __init__(
        self,
        backend: Backend,
        memory: BodyMemory,
        requests: Counter,
        *,
        token: str = "",
        max_message: int | None = None,
    ) -> None:
        self.backend, self.memory, self.requests, self.token = backend, memory, requests, token
        self.max_message = memory.most if max_message is None else max_message
        self._turns = asyncio.Semaphore(max(FEWEST_READ, memory.most // max(1, self.max_message)))
        self._strangers_turns = asyncio.Semaphore(1)

    @asynccontextmanager
    async def listening(
        self, host: str, port: int, deadline: float, certificate: Certificate | None = None
    ) -> AsyncIterator[int]:
        """Serve while the body runs; yields the port.

        Args:
            host: address to listen on.
            port: 0: a free one.
            deadline: seconds in which a message must be here, and for the requests that are here in
                the end.
            certificate: None: without TLS.

        Raises:
            UserError: if the address is taken or not ours.
        """
        last = LAST_REQUESTS + 2 * deadline
        options = {
            **dict(UNLIMITED),
            "grpc.max_receive_message_length": min(self.max_message, INT_MAX),
            "grpc.http2.lookahead_bytes": WINDOW,
            "grpc.http2.bdp_probe": 0,  # it makes the window larger
            "grpc.max_connection_age_ms": round(1000 * LONGEST_CONNECTION),
            "grpc.max_connection_age_grace_ms": min(round(1000 * last), INT_MAX),
            "grpc.so_reuseport": 0,
            "grpc.server_handshake_timeout_ms": round(1000 * connections.HEAD_TIMEOUT),
        }
        most = min(max(FEWEST_REQUESTS, self.memory.most // WINDOW), MOST_REQUESTS)
        server = grpc.aio.server(options=tuple(options.items()), maximum_concurrent_rpcs=most)
        handlers = grpc.method_handlers_generic_handler(SERVICE, self._handlers(deadline))
        health = grpc.stream_unary_rpc_method_handler(self._guarded(CHECK, self._health, deadline))
        checks = grpc.method_handlers_generic_handler(HEALTH, {CHECK: health})
        server.add_generic_rpc_handlers((handlers, checks))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound: int
            if certificate is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, renewed_credentials(certificate))
        except RuntimeError as error:
            raise UserError(f"--grpc-port: cannot listen on {address}") from error
        await server.start()
        log_event("gRPC", host=host, port=bound)
        try:
            yield bound
        finally:
            await server.stop(deadline)

    def _handlers(self, deadline: float) -> dict[str, Any]:
        answers: dict[str, Callable[[bytes, Any], Awaitable[bytes]]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        # Of a stream gRPC reads nothing before it is told to; a stream of one is the same request.
        handlers = {
            name: grpc.stream_unary_rpc_method_handler(self._guarded(name, answer, deadline))
            for name, answer in answers.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._no_stream)
        return handlers

    def _guarded(
        self, name: str, answer: Callable[[bytes, Any], Awaitable[bytes]], deadline: float
    ) -> Callable[[Any, Any], Awaitable[bytes]]:
        is_open = name in OPEN
        turns = self._strangers_turns if is_open and self.token else self._turns

        def count(status: int) -> None:
            if name == "ModelInfer":
                self.requests.labels(str(status)).inc()

        async def guarded(_: Any, context: Any) -> bytes:
            message = b""
            try:
                if self.token and not is_open:
                    self._check_token(context)
                if name in WITH_MESSAGE:
                    message = await read_message(context, turns, deadline)
                    if name != "ModelInfer" and len(message) > connections.LONGEST_HEAD:
                        most = connections.LONGEST_HEAD // 1024
                        raise BadRequest(f"message: more than {most} KiB")
                said = await answer(message, context)
            except Exception as error:
                found = problem(error, name)
            except asyncio.CancelledError:
                left = context.time_remaining()
                count(LEFT if left is None or left > 0 else TOO_LATE)
                raise
            else:
                count(200)
                return said
            count(http_status(found.code))
            await context.abort(BY_NUMBER[found.code], found.message, found.trailers)
            raise AssertionError

        return guarded

    def _check_token(self, context: Any) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        scheme, _, token = str(given).partition(" ")
        right = hmac.compare_digest(token.strip().encode(), self.token.encode())
        if scheme.lower() != "bearer" or not right:
            code = grpc.StatusCode.UNAUTHENTICATED.value[0]
            raise Refused(code, "a bearer token is needed: authorization: Bearer TOKEN")

    async def _live(self, _: bytes, __: Any) -> bytes:
        return serialized(pb.ServerLiveResponse(live=self.backend.is_live))

    async def _health(self, _: bytes, __: Any) -> bytes:
        return HEALTHY if self.backend.is_ready else NOT_SERVING

    async def _ready(self, _: bytes, __: Any) -> bytes:
        return serialized(pb.ServerReadyResponse(ready=self.backend.is_ready))

    async def _model_ready(self, message: bytes, _: Any) -> bytes:
        asked = parsed(pb.ModelReadyRequest, message)
        await self.backend.metadata(asked.name, asked.version)
        return serialized(pb.ModelReadyResponse(ready=self.backend.is_ready))

    async def _server_metadata(self, _: bytes, __: Any) -> bytes:
        return serialized(pb.ServerMetadataResponse(**server_metadata(version_of("codedinvnet"))))

    async def _model_metadata(self, message: bytes, _: Any) -> bytes:
        asked = parsed(pb.ModelMetadataRequest, message)
        found = await self.backend.metadata(asked.name, asked.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return serialized(
            pb.ModelMetadataResponse(
                name=found["name"],
                versions=found.get("versions") or (),
                platform=found.get("platform") or "",
                inputs=[tensor(**spec_of(spec)) for spec in found["inputs"]],
                outputs=[tensor(**spec_of(spec)) for spec in found["outputs"]],
            )
        )

    async def _infer(self, message: bytes, context: Any) -> bytes:
        headers = tuple(
            (name, value)
            for name, value in context.invocation_metadata() or ()
            if isinstance(value, str) and not name.startswith("grpc-") and name != "user-agent"
        )
        if self.token:  # it is ours
            headers = tuple(header for header in headers if header[0] != "authorization")
        with self.memory.holding() as hold:
            hold(len(message))
            answer, trailers = await self.backend.infer(
                message, context.time_remaining(), headers, hold
            )
        context.set_trailing_metadata(trailers)
        return answer

    async def _no_stream(self, _: Any, context: Any) -> None:
        told = "ModelStreamInfer is not supported: send each request by ModelInfer"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, told)


async def read_message(context: Any, turns: asyncio.Semaphore, seconds: float) -> bytes:
    """Return a request's message.

    Args:
        context: of the request.
        turns: one is had while it is read.
        seconds: in which it must be here.

    Raises:
        TooSlow: if it is not.
        BadRequest: if there is none.
    """

    async def read() -> Any:
        async with turns:
            return await context.read()

    try:
        message = await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise TooSlow(f"message: not here after {seconds:g} s") from None
    if not isinstance(message, bytes):
        raise BadRequest("message: there is none")
    return message


def renewed_credentials(certificate: Certificate) -> Any:
    """Return a server's credentials: each connection begins with what the files have then."""

    def configuration() -> Any:
        pair = (certificate.key.read_bytes(), certificate.chain.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair])

    found: list[Any] = []
    renewal = Renewal(certificate, lambda: found.append(configuration()), "gRPC")

    def news() -> Any:  # called in threads of gRPC's
        renewal.look()
        return found.pop() if found else None

    return grpc.dynamic_ssl_server_credentials(configuration(), news)


def spec_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tensor's metadata over HTTP have in a message."""
    shape = [int(size) for size in spec["shape"]]
    return {"name": spec["name"], "datatype": spec["datatype"], "shape": shape}


def serialized(message: Any) -> bytes:
    """Return a message's bytes."""
    found: bytes = message.SerializeToString()
    return found
