"""gRPC: unary calls of any method, passed on from clients to upstreams byte for byte.

Calls of the Open Inference Protocol are hedged as over HTTP, and those of other services where
`--route 'POST /package.Service/Method hedge=on'` names them. Streaming methods are not supported.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from codedinvnet.common.errors import UserError, described
from codedinvnet.gateway.access import AccessLog
from codedinvnet.gateway.attempts import HOLD, SIGNS, UNSURE
from codedinvnet.gateway.calls import OUTCOMES, Attempt, Call, Cause, Failure, State
from codedinvnet.gateway.cluster import PROBE_TIMEOUT, Cluster, Endpoint
from codedinvnet.gateway.dispatcher import Dispatcher, Refused
from codedinvnet.gateway.priority import FIELD, granted, name_of
from codedinvnet.gateway.routes import V2_GRPC, Routes
from codedinvnet.gateway.tokens import UpstreamToken
from codedinvnet.gateway.tracing import RequestTrace
from codedinvnet.net.client import CONNECT_TIMEOUT, parse_origin
from codedinvnet.net.grpc import (
    Calls,
    Turns,
    grpc,
    renewed_credentials,
    server_settings,
    settings,
)  # fmt: skip
from codedinvnet.net.guard import NEEDED, Guard
from codedinvnet.net.memory import Memory
from codedinvnet.net.resolve import Resolver
from codedinvnet.net.tls import Certificate
from codedinvnet.scheduler.group import size_class

STREAMING = frozenset({f"{V2_GRPC}ModelStreamInfer", "/grpc.health.v1.Health/Watch"})
HEALTH, HEALTHY, NOT_SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01", b"\x08\x02"
"""The gateway answers this for itself."""
STATEFUL = b"sequence_id", b"shared_memory_region"
"""A message with one of these must not be sent twice."""
FAILURES = frozenset(
    {"ABORTED", "CANCELLED", "DATA_LOSS", "DEADLINE_EXCEEDED", "INTERNAL", "NOT_FOUND"}
    | {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN"}
)
"""Codes by which an upstream fails a call that another may answer."""
BROKEN = ("Socket closed", "onnection reset", "recvmsg", "GOAWAY", "Broken pipe")
"""How gRPC tells that a connection broke while a call was under way."""
CODE = "rpc.grpc.status_code"
"""The attribute of spans."""
CODES = {
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
STATUSES = {"NOT_FOUND": 404, "RESOURCE_EXHAUSTED": 429}
PROBE_REFUSALS = frozenset({"UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"})
"""Codes of a server that is up, but has no such method or wants a token for it."""
CHANNEL = settings(
    max_send_message_length=-1, max_receive_message_length=-1, max_metadata_size=1 << 20,
    initial_reconnect_backoff_ms=100, min_reconnect_backoff_ms=1000,
    max_reconnect_backoff_ms=1000, enable_retries=0, enable_http_proxy=0,
    use_local_subchannel_pool=1,
)  # fmt: skip
READ_TIMEOUT, READS = 60.0, 4
"""Seconds in which a client's message must be here, and messages that are read at once: as many as,
with an eighth of the memory each, leave others half of it."""
Metadata: TypeAlias = "Sequence[tuple[str, str | bytes]]"


class Answer(NamedTuple):
    """What an upstream said."""

    code: Any
    body: bytes = b""
    details: str = ""
    initial: Metadata = ()
    trailing: Metadata = ()


def status_of(code: str) -> int:
    """Return the class of HTTP's statuses that a code of gRPC is nearest to, as a status."""
    if code == "OK":
        return 200
    return 500 if code in FAILURES - {"NOT_FOUND"} or code == "UNIMPLEMENTED" else 400


def _pairs(metadata: Any) -> Metadata:
    """Return metadata without gRPC's own."""
    return tuple(pair for pair in metadata or () if not pair[0].startswith("grpc-"))


class GrpcClient:
    """A channel to one upstream, at grpc://HOST:PORT, or grpcs:// for TLS.

    Args:
        url: of the upstream.
        resolver: finds the addresses of its name where gRPC itself does not.
        roots: certificates to trust, PEM; None: those that gRPC carries.
    """

    def __init__(self, url: str, resolver: Resolver, roots: bytes | None = None) -> None:
        self.resolver = resolver
        self.loop, self.origin = asyncio.get_running_loop(), parse_origin(url, kind="grpc")
        host, port = self.origin.host, self.origin.port
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self.origin.is_secure:
            named = (("grpc.ssl_target_name_override", self.origin.name),)
            credentials = grpc.ssl_channel_credentials(roots)
            self.channel = grpc.aio.secure_channel(target, credentials, (*CHANNEL, *named))
        else:
            self.channel = grpc.aio.insecure_channel(target, CHANNEL)

    async def connected(self) -> None:
        """Return when a call can be written.

        Raises:
            OSError: if there is no connection in time.
        """
        states, end = grpc.ChannelConnectivity, self.loop.time() + CONNECT_TIMEOUT
        while (state := self.channel.get_state(try_to_connect=True)) is not states.READY:
            left = end - self.loop.time()
            if state is states.TRANSIENT_FAILURE or left <= 0:
                raise OSError("no connection")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.channel.wait_for_state_change(state)

    async def ask(
        self, method: str, message: bytes, metadata: Metadata = (), seconds: float | None = None
    ) -> Answer:
        """Return what an upstream says, an error too."""
        call = self.channel.unary_unary(method)(message, metadata=metadata, timeout=seconds)
        try:
            body = await call
        except grpc.aio.AioRpcError as error:
            both = error.initial_metadata(), error.trailing_metadata()
            return Answer(error.code(), b"", error.details() or "", *map(_pairs, both))
        both = await call.initial_metadata(), await call.trailing_metadata()
        return Answer(grpc.StatusCode.OK, body, "", *map(_pairs, both))

    def close_idle(self) -> None:
        """Do nothing: on a shared connection each answer knows its call."""

    def close(self) -> None:
        """Close the channel once its calls have ended."""
        self._closing = self.loop.create_task(self.channel.close(grace=READ_TIMEOUT))


class GrpcCluster(Cluster):
    """Upstreams over gRPC."""

    async def probe(self, endpoint: Endpoint) -> str:
        client: Any = endpoint.client
        answer = await client.ask(f"{V2_GRPC}ServerReady", b"", seconds=PROBE_TIMEOUT)
        if answer.code.name in PROBE_REFUSALS:
            return ""
        if answer.code is not grpc.StatusCode.OK:
            return str(answer.details or answer.code.name)
        return "" if answer.body == HEALTHY else "it is not ready"


class GrpcCall(Call):
    """A client's unary call: a serialized message, and metadata as upstreams get them."""

    def __init__(self, server: GrpcServer, method: str, message: bytes, context: Any) -> None:
        own, sent = server.upstream_token, context.invocation_metadata() or ()
        tracer = server.dispatcher.tracer
        hidden = {"x-hedge", FIELD, "user-agent"} | (set() if own is None else {"authorization"})
        if tracer is not None:
            hidden |= tracer.fields
        metadata = [pair for pair in sent if pair[0] not in hidden and pair[0][:5] != "grpc-"]
        if own is not None and own.field:
            metadata.append(("authorization", own.field.decode().partition(": ")[2].strip()))
        route = server.routes.find(b"POST", method.encode())
        repeatable = route.is_repeatable and ("x-hedge", "off") not in map(tuple, sent)
        repeatable = repeatable and not any(word in message for word in STATEFUL)
        left, most = context.time_remaining(), route.limits.deadline
        deadline = time.monotonic() + (most if left is None else min(left, most))
        super().__init__(route, repeatable, size_class(len(message)), deadline, server.memory)
        for said in [str(value) for name, value in sent if name == FIELD][:1]:
            self.priority = granted(said, self.priority, False)
            metadata.append((FIELD, name_of(self.priority)))
        self.dispatcher, self.method = server.dispatcher, method
        self.access = server.access
        if self.access is not None:
            self.address = context.peer().partition(":")[2].rpartition(":")[0].encode()
        if tracer is not None:
            service, _, name = method.removeprefix("/").partition("/")
            about = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
            fields = {name: value for name, value in sent if isinstance(value, str)}
            self.trace = RequestTrace(tracer, method.removeprefix("/"), fields, about, {})
        self.message, self.metadata, self.size = message, metadata, len(message)
        server.memory.take(self.size)
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def attempt(self, endpoint: Endpoint, number: int) -> GrpcAttempt:
        return GrpcAttempt(self, endpoint, number)

    def fail(self, status: int, reason: str, retry_after: int = 0) -> None:
        last = None if self.last is None else self.last.reply
        if status == 504 or not isinstance(last, Answer):
            last = Answer(CODES.get(status, grpc.StatusCode.INTERNAL), details=reason)
        self.log("request failed", reason=reason)
        self.finish(last, OUTCOMES.get(status, "failed"))

    def method_and_path(self) -> tuple[str, str]:
        return "POST", self.method

    def finish(self, answer: Answer, outcome: str) -> None:
        """Send the client an answer."""
        self.passed_on = len(answer.body)
        if self.trace is not None:
            self.trace.span.set_attribute(CODE, answer.code.value[0])
        self.note(outcome, status_of(answer.code.name))
        if not self.answered.done():
            self.answered.set_result(answer)
        self.end()

    def break_off(self) -> None:
        """Do nothing: no unary answer is a stream."""


class GrpcAttempt(Attempt):
    """Sends a call to an endpoint."""

    call: GrpcCall
    fault: Failure | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        call, dispatcher = self.call, self.call.dispatcher
        client: Any = self.endpoint.client
        try:
            await client.connected()
        except OSError as error:
            self._failed(Cause.UNSENT, described(error))
            return
        self.become(State.HOLD)
        call.written = True
        seconds = max(0.001, call.deadline - time.monotonic()) if dispatcher.cancels else None
        metadata = call.metadata
        if self.trace is not None:
            metadata = [*metadata, *((k.lower(), v) for k, v in self.trace.fields.items())]
        answer = self.answer = await client.ask(call.method, call.message, metadata, seconds)
        if self.trace is not None:
            self.trace.span.set_attribute(CODE, answer.code.value[0])
        name, said, is_ok = answer.code.name, answer.details, answer.code is grpc.StatusCode.OK
        if any(sign.decode() in said for sign in SIGNS):
            self.endpoint.distrust(f"it said: {said[:200]}")
        elif time.monotonic() - self.began > UNSURE:  # its upstream may be found out
            await asyncio.sleep(HOLD)
        if self.is_over:
            return
        self.status = 200 if is_ok else STATUSES.get(name, 400)
        broken = name == "UNAVAILABLE" and any(words in said for words in BROKEN)
        if name in FAILURES and (call.repeatable or broken):
            cause = Cause.BROKEN if broken else Cause.STATUS
            self._failed(cause, f"{name}: {said[:200]}", answer)
        else:
            if name in FAILURES:
                self.fault = Failure(Cause.STATUS, f"{self.endpoint.url}: {name}: {said[:200]}")
            dispatcher.answered(self, is_ok)

    def _failed(self, cause: Cause, reason: str, answer: Answer | None = None) -> None:
        failure = Failure(cause, f"{self.endpoint.url}: {reason}", answer)
        self.call.dispatcher.failed(self, failure)

    def pass_on(self) -> None:
        self.call.finish(self.answer, "direct")

    def let_go(self) -> None:
        if self.is_over:  # one that is left goes on: some Tritons crash when calls are cancelled
            self._task.cancel()


class GrpcServer(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The gateway's side that clients over gRPC see; its arguments are those of `Gateway`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        routes: Routes,
        memory: Memory,
        guard: Guard,
        upstream_token: UpstreamToken | None = None,
    ) -> None:
        self.dispatcher, self.routes, self.memory = dispatcher, routes, memory
        self.guard, self.upstream_token = guard, upstream_token
        self.calls = Calls(memory)
        self.is_draining = False
        self.access: AccessLog | None = None

    async def start(
        self, host: str, port: int, most_body: int, certificate: Certificate | None
    ) -> int:
        """Listen, and return the port.

        Raises:
            UserError: if the address is taken, or not this machine's.
        """
        self._turns = Turns(READS, self.memory, most_body)
        options = settings(**server_settings(most_body))
        self._server = grpc.aio.server(handlers=(self,), options=options)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            found: int
            if certificate is None:
                found = self._server.add_insecure_port(where)
            else:
                found = self._server.add_secure_port(where, renewed_credentials(certificate))
        except RuntimeError as error:
            raise UserError(f"--grpc-port: cannot listen on {where}") from error
        await self._server.start()
        return found

    async def stop(self, seconds: float) -> None:
        """Take no more calls, and wait for those that there are."""
        await self._server.stop(seconds)

    def service(self, details: Any) -> Any:
        """Return what answers a method; its message is not read before that asks for it."""
        method: str = details.method
        if method in STREAMING:
            return None

        async def answer(_: Any, context: Any) -> bytes:
            return await self._answer(method, context)

        return grpc.stream_unary_rpc_method_handler(answer)

    async def _answer(self, method: str, context: Any) -> bytes:
        if method == HEALTH:
            self.calls.admit(context, False)
            ready = self.dispatcher.cluster.is_ready and not self.is_draining
            return HEALTHY if ready else NOT_SERVING
        sent, codes = dict(context.invocation_metadata() or ()), grpc.StatusCode
        is_known = self.guard.is_right(str(sent.get("authorization", "")).encode())
        has_room = self.calls.admit(context, is_known)
        if not is_known:
            self.routes.unread.count("refused", 401)
            await self.calls.abort(context, codes.UNAUTHENTICATED, NEEDED)
        if self.memory.is_full or not has_room:
            self.routes.find(b"POST", method.encode()).count("refused", 503)
            why = "memory is full" if has_room else "calls are too many"
            await self.calls.abort(context, codes.UNAVAILABLE, f"the gateway's {why}")
        try:
            message = await self._turns.read(context, READ_TIMEOUT)
        except TimeoutError as error:
            why = str(error) or f"not here after {READ_TIMEOUT:g} s"
            await self.calls.abort(context, codes.DEADLINE_EXCEEDED, f"message: {why}")
        if not isinstance(message, bytes):
            await self.calls.abort(context, codes.INVALID_ARGUMENT, "there is no message")
        call = GrpcCall(self, method, message, context)
        try:
            self.dispatcher.submit(call)
            answer = await call.answered
        except Refused as refused:
            call.note("refused", 503)
            call.end()
            await self.calls.abort(context, codes.UNAVAILABLE, str(refused))
        except asyncio.CancelledError:
            if not call.is_over:
                call.note("cancelled", 0)
                self.dispatcher.cancel(call)
            raise
        self.calls.answered(context, len(answer.body))
        await context.send_initial_metadata(answer.initial)
        if answer.code is not codes.OK:
            await self.calls.abort(context, answer.code, answer.details, answer.trailing)
        context.set_trailing_metadata(answer.trailing)
        return answer.body
