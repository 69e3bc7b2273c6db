"""Asks one server over HTTP/1.1, on kept connections, with little besides the parser's own work.

Answers are whole, and their bodies as they came. A connection on which something came that nobody
had asked for is used no more: the next request would take that for its answer.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from typing import NamedTuple

import aiohappyeyeballs
import httptools

from codedinvnet.serving.gateway.calls import LARGEST, Headers
from codedinvnet.serving.workers.pool import SILENT

CONNECT_TIMEOUT = 1.0
"""Seconds in which a connection must be there, if nobody says."""
NEXT_ADDRESS = 0.25
"""Seconds after which a name's next address is tried as well."""
LONGEST_IDLE = 15.0
"""Seconds after which a connection is used no more: the server may be about to close it."""
OLDEST = 600.0
"""Seconds after which nothing is asked over a connection: its name may be elsewhere by now."""
MOST_HEAD = 1 << 20
"""Bytes that an answer may have until its headers are here; with its body they are `LARGEST`."""
PIECE = 64
"""Bytes that a piece of a body takes here besides its own, roughly."""
LENGTHS = frozenset({"content-length", "transfer-encoding"})
"""Headers that say where a body ends; without them it ends with the connection."""


class Answer(NamedTuple):
    """What a server says."""

    status: int
    headers: Headers
    """In lower case."""
    body: bytes


class Broken(ConnectionError):
    """A connection broke while a request was under way: the server may have been at it."""


class Closed(Broken):
    """A kept connection was closed before anything of the answer came: the request may be new."""


class Connection(asyncio.Protocol):
    """One connection, at one request at a time."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.answer: asyncio.Future[Answer] | None = None
        """What is waited for; None between two requests."""
        self.headers: list[tuple[str, str]] = []
        self.headed = False
        """Whether all headers are here: what follows a body in chunks is none."""
        self.body: list[bytes] = []
        self.size = 0
        """Bytes of the answer that are here."""
        self.kept = self.begun = self.endless = False
        """Whether it was used before, an answer has begun, and that ends with the connection."""
        self.sound = True
        """Whether another request may be sent."""
        self.since = 0.0
        """When it was used last."""
        self.made = asyncio.get_running_loop().time()

    def is_open(self) -> bool:
        """Tell whether another request may be sent, as far as is known."""
        return self.sound and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    async def ask(self, request: list[bytes], seconds: float) -> Answer:
        """Send a request, and return the answer.

        Raises:
            Closed: if the connection was kept, and turns out to be closed.
            asyncio.TimeoutError: if there is no answer in time.
            OSError: if the server hangs up, or says what is no HTTP.
        """
        loop = asyncio.get_running_loop()
        self.answer, self.begun, self.size = loop.create_future(), False, 0
        timer = loop.call_later(seconds, self.fail, asyncio.TimeoutError())
        self.transport.writelines(request)
        try:
            return await self.answer
        finally:
            timer.cancel()
            self.answer, self.kept, self.since = None, True, loop.time()
            if self.transport.get_write_buffer_size():  # answered before it was read
                self.sound = False

    def fail(self, error: Exception) -> None:
        """Use the connection no more; what is waited for does not come."""
        self.sound = False
        self.transport.abort()
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)

    def data_received(self, data: bytes) -> None:
        if self.answer is None:
            self.fail(ConnectionError("nobody had asked"))
            return
        self.size += len(data)
        most = LARGEST if self.headed else MOST_HEAD
        if self.size > most:
            what = "answer" if self.headed else "headers"
            self.fail(Broken(f"its {what} took more than {most} bytes"))
            return
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.fail(Broken(f"its answer is not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.endless and exc is None:
            self.on_message_complete()
        gone = "it hung up" if exc is None else str(exc)
        fresh = self.begun or not self.kept
        self.fail(Broken(gone) if fresh else Closed(gone))

    # What the parser finds

    def on_message_begin(self) -> None:
        if self.answer is None or self.answer.done():  # nobody had asked for more
            self.sound = False
        self.headers, self.body = [], []
        self.begun, self.headed, self.endless = True, False, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.headed:
            self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.headed = True
        lasts = self.parser.should_keep_alive()
        self.endless = not lasts and LENGTHS.isdisjoint(dict(self.headers))

    def on_body(self, body: bytes) -> None:
        self.body.append(body)
        self.size += PIECE

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        if status < 200:  # the answer itself follows
            return
        self.endless = False
        self.sound &= self.parser.should_keep_alive()
        if self.answer is None or self.answer.done():
            self.sound = False
            return
        body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        self.answer.set_result(Answer(status, tuple(self.headers), body))
        self.body = []


def _is_usable(connection: Connection) -> bool:
    """Tell whether an idle connection may be used again."""
    now = asyncio.get_running_loop().time()
    is_fresh = now - connection.since < LONGEST_IDLE and now - connection.made < OLDEST
    return connection.is_open() and is_fresh


class HttpClient:
    """Sends requests to one server; its idle connections are kept.

    Args:
        host: name or address.
        port: its.
        context: of TLS; None: without.
        connect: seconds in which a connection must be there; a request's own may be fewer.
        certified: the name that its certificate must have, and that it is asked by; "": the host.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        connect: float = CONNECT_TIMEOUT,
        certified: str = "",
    ) -> None:
        self.host, self.port, self.context, self.connect = host, port, context, connect
        self.certified = name = certified or host
        named = f"[{name}]" if ":" in name else name
        self._host = named if port == (80 if context is None else 443) else f"{named}:{port}"
        self._idle: deque[Connection] = deque()
        """The one that was used last is the last."""
        self._closed = False

    async def ask(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Headers = (),
        *,
        tries: int = 1,
    ) -> Answer:
        """Return the answer to a request.

        Args:
            method: of HTTP.
            path: with what precedes the protocol's.
            seconds: for the answer, connecting included.
            body: None: there is none.
            headers: others than those of the connection.
            tries: how often it is sent, if kept connections turn out to be closed.

        Raises:
            asyncio.TimeoutError: if there is none in time, or no connection; it says which.
            OSError: if the server cannot be reached, hangs up, or says what is no HTTP.
            Broken: likewise, if it may have been at the request.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines)
        if max(head.count("\r"), head.count("\n")) >= len(lines):
            raise ConnectionError("a header has several lines")
        request = [head.encode("latin-1", "replace") + b"\r\n\r\n", *([body] if body else ())]
        broke = False
        while True:
            tries -= 1
            try:
                connection = self._kept() or await self._connected(until - loop.time())
                if not connection.is_open():  # nothing was sent yet
                    raise ConnectionError("it hung up")
            except (OSError, asyncio.TimeoutError) as error:  # two in Python 3.10
                if not broke:
                    raise
                raise Broken(f"it hung up, and then: {error}") from error
            try:
                return await connection.ask(request, until - loop.time())
            except Closed:
                broke = True
                if not tries:
                    raise
            except asyncio.TimeoutError:
                raise asyncio.TimeoutError(f"{SILENT} {seconds:.3g} s") from None
            except asyncio.CancelledError:
                connection.fail(ConnectionError("cancelled"))
                raise
            finally:
                if connection.sound and not self._closed:
                    self._keep(connection)
                else:
                    connection.transport.abort()

    def _keep(self, connection: Connection) -> None:
        """Keep a connection for another request, and close those that were idle for too long."""
        self._idle.append(connection)
        while self._idle and not _is_usable(self._idle[0]):
            self._idle.popleft().transport.abort()

    def _kept(self) -> Connection | None:
        """Return an idle connection, which is used no longer than it may be idle."""
        while self._idle:
            connection = self._idle.pop()
            if _is_usable(connection):
                return connection
            connection.transport.abort()
        return None

    async def _connected(self, seconds: float) -> Connection:
        loop = asyncio.get_running_loop()
        limit = min(seconds, self.connect)

        async def connected() -> Connection:
            found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            there = await aiohappyeyeballs.start_connection(
                found, happy_eyeballs_delay=NEXT_ADDRESS
            )
            secure = self.context is not None
            _, connection = await loop.create_connection(
                Connection,
                sock=there,
                ssl=self.context,
                server_hostname=self.certified if secure else None,
                ssl_handshake_timeout=self.connect if secure else None,  # a minute, if not told
            )
            return connection

        try:
            return await asyncio.wait_for(connected(), limit)
        except asyncio.TimeoutError:
            raise asyncio.TimeoutError(f"no connection within {limit:.3g} s") from None

    def close(self) -> None:
        """Close its connections; those that are at a request when that ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().transport.close()
