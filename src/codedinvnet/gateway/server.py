"""The gateway's side that clients see: HTTP/1.1 on connections of their own.

Requests of one connection are answered in order, one at a time. What comes meanwhile waits, and
is not read beyond a bound. Whatever is malformed, too large or too slow is refused, and ends its
connection.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

from codedinvnet.gateway.memory import Memory
from codedinvnet.gateway.proxy import OUTCOME, HttpCall, problem
from codedinvnet.net.background import Background
from codedinvnet.net.http1 import (
    END,
    MOST_HEAD,
    BadMessage,
    Chunks,
    Fields,
    RequestHead,
    ResponseHead,
    read_request,
    write_fields,
)

HEAD_TIMEOUT, BODY_TIMEOUT = 10.0, 60.0
"""Seconds for a request's head, and without a byte of its body."""
KEEP_ALIVE = 75.0
"""Seconds that an idle connection stays open."""
UNREAD = 60.0
"""Seconds for which a client may take nothing of its answer."""
SWEEP = 1.0
"""Seconds between two looks for connections that are too slow."""
MOST_AHEAD = 1 << 16
"""Bytes of further requests that wait for the answer to the one before."""
LINGER = 2.0
"""Seconds for which a client may go on sending after the last answer; nothing of it is read."""
HIGH, LOW = 1 << 18, 1 << 14
"""Bytes that wait for a client at which an upstream is no longer read, and is again."""
STILL_THERE = (0.0, 0.2, 1.0)
"""Seconds after a client has sent its last byte, at which it is told that the gateway goes on. One
that is gone refuses that, which shows when the next one is sent."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REASONS = {
    200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found",
    405: b"Method Not Allowed", 408: b"Request Timeout", 411: b"Length Required",
    413: b"Content Too Large", 417: b"Expectation Failed", 421: b"Misdirected Request",
    431: b"Request Header Fields Too Large", 500: b"Internal Server Error",
    501: b"Not Implemented", 502: b"Bad Gateway", 503: b"Service Unavailable",
    504: b"Gateway Timeout",
}  # fmt: skip
FULL = "the gateway's memory is full: try again later"
WEBSOCKETS = "upgrades are not supported: connect WebSocket clients to an upstream directly"


class Reply(NamedTuple):
    """An answer of the gateway's own."""

    status: int
    body: bytes
    kind: str = "application/json"


class Handler(Protocol):
    """What answers requests."""

    def precheck(self, head: RequestHead) -> Reply | None:
        """Return why a request is refused before its body is read; None if it is not."""

    def handle(
        self, client: ClientConnection, head: RequestHead, body: Sequence[bytes], trailers: Fields
    ) -> HttpCall | Reply | Awaitable[HttpCall | Reply | None] | None:
        """Answer a request: by a reply, or by a call that answers later; None: it has already."""


class ClientConnection(asyncio.Protocol):
    """A client's connection.

    Args:
        server: has it among its connections.
    """

    __slots__ = (
        "_ahead", "_ahead_size", "_body", "_body_size", "_chunks", "_counted", "_eof", "_head",
        "_held", "_is_chunking", "_is_ending", "_is_paused", "_left", "_progress", "_since",
        "_task", "_write_left", "call", "is_answering", "memory", "server", "transport",
    )  # fmt: skip

    def __init__(self, server: GatewayServer) -> None:
        self.server, self.memory = server, server.memory
        self.transport: asyncio.Transport
        self.call: HttpCall | None = None
        self.is_answering = False
        """Whether a request is complete, and its answer is not."""
        self._held = b""
        """The beginning of a head."""
        self._ahead: list[bytes] = []
        self._ahead_size = 0
        """What came behind the request that is being answered."""
        self._head: RequestHead | None = None
        """Of the request whose body is to come, or that is being answered."""
        self._body: list[bytes] = []
        self._body_size = 0
        self._chunks: Chunks | None = None
        self._left = 0
        self._is_chunking = self._is_ending = self._is_paused = self._eof = False
        self._counted = 0
        """Bytes that wait for the client, as they were counted last."""
        self._write_left: int | None = None
        """Bytes of an answer with a length that are to come."""
        self._since = self._progress = time.monotonic()
        """When it became idle or a byte came, and when the client last took a byte."""
        self._task: asyncio.Task[None] | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.set_write_buffer_limits(HIGH, LOW)
        self.server.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.memory.give(self._counted + self._body_size + self._ahead_size + len(self._held))
        self._counted = self._body_size = self._ahead_size = 0
        self._held = b""
        call, self.call = self.call, None
        if self._task is not None:
            self._task.cancel()
        if call is not None:
            call.gone()

    def eof_received(self) -> bool:
        """Answer a client that has sent all it has, unless it is gone."""
        self._eof = True
        if not self.is_answering:
            return False
        for seconds in STILL_THERE if self._head is not None and not self._head.is_old else ():
            self.server.loop.call_later(seconds, self._ask_whether_there)
        return self.transport.get_extra_info("ssl_object") is None

    def _ask_whether_there(self) -> None:
        is_waiting = self.is_answering and self._write_left is None and not self._is_chunking
        if is_waiting and not self.transport.is_closing():
            self.transport.write(CONTINUE)

    def abort(self) -> None:
        """Close at once, so that the client sees that its answer is not complete."""
        self.call = None
        self._is_ending = True
        if not self._is_chunking and not self._write_left and not self.transport.is_closing():
            # The end of the connection would be that of the body.
            own = self.transport.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not (self.is_answering or self._head or self._held or self._is_ending)

    def is_overdue(self, now: float) -> str:
        """Return which limit the client has exceeded, "" if none; see `GatewayServer.sweep`."""
        waiting = self.transport.get_write_buffer_size()
        if waiting < self._counted or not waiting:
            self._progress = now
        self._count(waiting)
        if waiting and now - self._progress > UNREAD:
            return "unread"
        age = now - self._since
        if self.is_answering or self._is_ending:
            return ""
        if self._head is not None:
            return "body" if age > BODY_TIMEOUT else ""
        return (
            ("head" if self._held else "idle")
            if age > (HEAD_TIMEOUT if self._held else KEEP_ALIVE)
            else ""
        )

    def close_if_idle(self) -> None:
        """Close unless a request is on its way, which closes it once it is answered."""
        if self.is_idle:
            self.transport.close()

    # What the client sends

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        if self.is_answering:
            self._wait(data)
            return
        if self._head is not None or not self._held:
            self._since = time.monotonic()
        try:
            while data and not self.is_answering:
                data = self._read_head(data) if self._head is None else self._read_body(data)
        except BadMessage as error:
            self.refuse(error.status, str(error), int(error.status == 503), closes=True)
            return
        if data and not self.transport.is_closing():
            self._wait(data)

    def _wait(self, data: bytes) -> None:
        """Keep what came behind the request that is being answered."""
        self._ahead.append(data)
        self._ahead_size += len(data)
        self.memory.take(len(data))
        if self._ahead_size > MOST_AHEAD:
            self.transport.pause_reading()

    def _read_head(self, data: bytes) -> bytes:
        if self._held:
            self.memory.give(len(self._held))
            data, self._held = self._held + data, b""
        if data.startswith(b"\r\n"):  # clients may send an empty line behind a body
            data = data[2:]
            if not data:
                return b""
        end = data.find(END, 0, MOST_HEAD)
        if end < 0:
            if len(data) >= MOST_HEAD:
                raise BadMessage(f"the headers take more than {MOST_HEAD} bytes", 431)
            if b"\n" in data[:MOST_HEAD].replace(b"\r\n", b""):
                raise BadMessage("a line ends with a bare LF")
            self._held = data
            self.memory.take(len(data))
            return b""
        end += len(END)
        head = self._head = read_request(data[:end])
        self._body, self._body_size, self._chunks, self._left = [], 0, None, 0
        known = head.known
        if head.method == b"CONNECT" or b"websocket" in known.get(b"upgrade", b"").lower():
            raise BadMessage(WEBSOCKETS, 501)
        has_body = head.chunked or bool(head.length)
        if (refusal := self.server.handler.precheck(head)) is not None:
            self._answer(refusal, closes=has_body)
            return b"" if has_body else data[end:]
        if (head.length or 0) > self.server.most_body:
            raise BadMessage(f"the body has more than {self.server.most_body} bytes", 413)
        if has_body and self.memory.is_full:
            raise BadMessage(FULL, 503)
        if has_body and b"expect" in known:
            if known[b"expect"].lower() != b"100-continue":
                raise BadMessage("only Expect: 100-continue is supported", 417)
            if len(data) == end:
                self.transport.write(CONTINUE)
        if head.chunked:
            self._chunks = Chunks()
        elif head.length:
            self._left = head.length
        else:
            self._complete([])
        return data[end:]

    def _read_body(self, data: bytes) -> bytes:
        if self._chunks is None:
            piece, rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            self._keep([piece])
            if not self._left:
                self._complete([])
            return rest
        chunks = self._chunks
        self._keep(chunks.feed(data))
        if not chunks.done:
            return b""
        self._complete(chunks.trailers)
        return chunks.rest

    def _keep(self, pieces: list[bytes]) -> None:
        size = sum(map(len, pieces))
        self._body += pieces
        self._body_size += size
        self.memory.take(size)
        if self._body_size > self.server.most_body:
            raise BadMessage(f"the body has more than {self.server.most_body} bytes", 413)
        if self.memory.used > self.memory.most and size:
            raise BadMessage(FULL, 503)

    def _complete(self, trailers: Fields) -> None:
        """A request is complete: have it answered."""
        head, body = self._head, self._body
        assert head is not None
        self.is_answering, self._body = True, []
        size, self._body_size = self._body_size, 0
        found = self.server.handler.handle(self, head, body, trailers)
        if isinstance(found, Awaitable):
            self._task = self.server.loop.create_task(self._later(found, size))
        else:
            self._take(found, size)

    async def _later(self, coming: Awaitable[HttpCall | Reply | None], size: int) -> None:
        try:
            found = await coming
        except BaseException:
            self.memory.give(size)
            raise
        self._task = None
        self._take(found, size)

    def _take(self, found: HttpCall | Reply | None, size: int) -> None:
        if isinstance(found, HttpCall):
            found.size = size
            if self.transport.is_closing():
                found.gone()
            elif not found.is_over:
                self.call = found
            found.release()
            return
        self.memory.give(size)
        if found is not None:
            self._answer(found)

    # What the client gets

    def _write(self, data: Sequence[bytes]) -> None:
        transport = self.transport
        if transport.is_closing():
            return
        if len(data) == 1:
            transport.write(data[0])
        else:
            transport.writelines(data)
        if (waiting := transport.get_write_buffer_size()) or self._counted:
            self._count(waiting)

    def _count(self, waiting: int) -> None:
        """Count what waits for the client."""
        if waiting != self._counted:
            self.memory.take(waiting - self._counted)
            if not self._counted:
                self._progress = time.monotonic()
            self._counted = waiting

    def pause_writing(self) -> None:
        self._is_paused = True
        if self.call is not None:
            self.call.pause()

    def resume_writing(self) -> None:
        self._is_paused, self._progress = False, time.monotonic()
        self._count(self.transport.get_write_buffer_size())
        if self.call is not None:
            self.call.resume()

    def _answer(self, reply: Reply, closes: bool = False) -> None:
        """Give an answer of the gateway's own."""
        fields = [(b"Content-Type", b" " + reply.kind.encode())]
        if reply.status == 401:
            fields.append((b"WWW-Authenticate", b" Bearer"))
        self._own(reply.status, fields, reply.body, closes)

    def refuse(self, status: int, reason: str, retry_after: int = 0, closes: bool = False) -> None:
        """Answer with an error.

        Args:
            status: of it.
            reason: in words.
            retry_after: seconds after which the client may try again; 0: nobody knows.
            closes: whether the connection ends by it.
        """
        fields = [(b"Content-Type", b" application/json")]
        if retry_after:
            fields.append((b"Retry-After", b" %d" % retry_after))
        self._own(status, fields, problem(reason), closes)

    def _own(self, status: int, fields: Fields, body: bytes, closes: bool) -> None:
        if closes:
            self.memory.give(self._body_size + len(self._held))
            self._body, self._body_size, self._held = [], 0, b""
        fields.append((b"Content-Length", b" %d" % len(body)))
        is_kept = not closes and self._is_kept()
        if not is_kept:
            fields.append((b"Connection", b" close"))
        reason = REASONS.get(status, b"")
        head = b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, write_fields(fields))
        is_head = self._head is not None and self._head.method == b"HEAD"
        self._write([head if is_head else head + body])
        self._done(is_kept)

    def _is_kept(self) -> bool:
        head = self._head
        if head is None or not head.keeps or self.server.is_draining:
            return False
        return not self._eof or bool(self._ahead)

    def respond(
        self,
        head: ResponseHead,
        added: Fields,
        body: Sequence[bytes],
        trailers: Fields,
        is_complete: bool,
    ) -> None:
        """Pass an upstream's answer on.

        Args:
            head: of it.
            added: further fields.
            body: what of its body is here.
            trailers: behind it, if it is complete.
            is_complete: whether all of it is here; otherwise `send_body` and `end_body` follow.
        """
        request = self._head
        assert request is not None
        fields, known = head.end_to_end(), head.known
        if head.length is None and is_complete and not trailers and head.has_body(request.method):
            length = sum(map(len, body))
            fields = [*fields, (b"Content-Length", b" %d" % length)]
        if added and OUTCOME not in known:
            fields = [*fields, *added]
        self._write_left = None
        is_kept = self._is_kept()
        start = b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)
        parts = [start, write_fields(fields)]
        open_ended = head.length is None and head.has_body(request.method)
        self._is_chunking = open_ended and (not is_complete or bool(trailers))
        if self._is_chunking and request.is_old:
            self._is_chunking = request.keeps = is_kept = False
        if self._is_chunking:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        if not is_kept:
            parts.append(b"Connection: close\r\n")
        elif request.is_old:
            parts.append(b"Connection: keep-alive\r\n")
        parts.append(b"\r\n")
        if not self._is_chunking:
            parts += body
        elif body:
            parts.append(chunk(b"".join(body)))
        if is_complete and self._is_chunking:
            parts += [b"0\r\n", write_fields(trailers), b"\r\n"]
        self._write(parts if sum(map(len, body)) > HIGH else [b"".join(parts)])
        if is_complete:
            self._done(is_kept)
        elif head.length is not None:
            self._write_left = head.length - sum(map(len, body))

    def send_body(self, data: bytes) -> None:
        """Send the next part of an answer's body."""
        self._write([chunk(data) if self._is_chunking else data])

    def end_body(self, trailers: Fields) -> None:
        """The answer's body is complete."""
        if self._is_chunking:
            self._write([b"0\r\n" + write_fields(trailers) + b"\r\n"])
        self._done(self._is_kept())

    def _done(self, is_kept: bool) -> None:
        """An answer is complete: read the next request, or close."""
        self.call = self._head = self._write_left = None
        self._is_chunking = self.is_answering = False
        self._since = time.monotonic()
        if not is_kept:
            self._close()
            return
        if self._ahead:
            # Not at once: a client with many requests ahead would keep others from their turn.
            self.server.loop.call_soon(self._go_on)

    def _close(self) -> None:
        """Close once the client has the answer, though it may still be sending."""
        transport = self.transport
        self._is_ending = True
        if self._eof or transport.is_closing() or not transport.can_write_eof():
            transport.close()
        else:  # closing with bytes unread would reset the connection, and the answer be lost
            transport.write_eof()
            self.server.loop.call_later(LINGER, transport.close)

    def _go_on(self) -> None:
        if self.is_answering or self.transport.is_closing():
            return
        data, self._ahead, size = b"".join(self._ahead), [], self._ahead_size
        self._ahead_size = 0
        self.memory.give(size)
        if size > MOST_AHEAD:
            self.transport.resume_reading()
        if data:
            self.data_received(data)


def chunk(data: bytes) -> bytes:
    """Return a part of a body as a chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class GatewayServer:
    """The connections of clients.

    Args:
        handler: answers requests.
        memory: counts what they hold.
        most_body: bytes of one request's body.
        most_connections: those beyond are closed at once.
    """

    def __init__(
        self,
        handler: Handler,
        memory: Memory,
        most_body: int,
        most_connections: int,
    ) -> None:
        self.handler, self.memory, self.most_body = handler, memory, most_body
        self.most_connections = most_connections
        self.connections: set[ClientConnection] = set()
        self.is_draining = False
        self.loop = asyncio.get_running_loop()
        self._background = Background()
        self._servers: list[asyncio.AbstractServer] = []

    def add(self, connection: ClientConnection) -> None:
        """Take a connection in, or close it if there are too many."""
        if len(self.connections) >= self.most_connections:
            connection.transport.abort()
        self.connections.add(connection)

    def start(self) -> None:
        """Look for slow clients from now on."""
        self._background.spawn(self._sweep_on())

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            for number, connection in enumerate(list(self.connections)):
                if number % 1000 == 999:
                    await asyncio.sleep(0)
                overdue = connection.is_overdue(now)
                if overdue == "unread":
                    connection.transport.abort()
                elif overdue in ("head", "body"):
                    connection.refuse(408, f"the request's {overdue} took too long", closes=True)
                elif overdue:
                    connection.transport.close()

    def announce_draining(self) -> None:
        """Close connections as soon as they are idle."""
        self.is_draining = True
        for connection in list(self.connections):
            connection.close_if_idle()

    async def stop(self, seconds: float) -> None:
        """Wait until all connections are closed, and abort those that are left after some time."""
        self.announce_draining()
        until = time.monotonic() + seconds
        while self.connections and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.transport.abort()
        await self._background.stop()
