"""An HTTP/1.1 client on kept connections: whole answers, or streams with back-pressure.

A connection on which unrequested bytes came is never used again: the next
request would take it for its answer. To cancel a request is to close its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import aiohappyeyeballs

from codedinvnet.common.errors import UserError
from codedinvnet.net.http1 import (
    BadMessage,
    Block,
    Chunks,
    Fields,
    HeadReader,
    ResponseHead,
    read_response,
    write_fields,
)
from codedinvnet.net.resolve import Resolver

CONNECT_TIMEOUT = 1.0
"""Seconds in which a connection must be there, name lookup and TLS included."""
NEXT_ADDRESS = 0.25
"""Seconds after which a name's next address is tried as well."""
LONGEST_IDLE = 15.0
"""Seconds after which an idle connection is closed: the server may be about to close it."""
OLDEST = 600.0
"""Seconds after which a connection gets no other request: its name may be elsewhere by now."""
MOST_ANSWER = 1 << 30
"""Bytes of an answer that is read as a whole."""
MOST_INTERIM = 16
"""Heads that may precede an answer's own: 100, some of 103, and 102 every 20 s for minutes."""


class Broken(ConnectionError):
    """A connection broke after a request was written: the server may have handled it.

    It is stale if it was a kept one and closed before anything of the answer came.
    """

    def __init__(self, reason: str, stale: bool = False) -> None:
        super().__init__(reason)
        self.stale = stale


class Receiver(Protocol):
    """Takes an answer, part by part. `on_end` or `on_lost` comes last, once."""

    def on_head(self, head: ResponseHead) -> None:
        """Take the status and the fields."""

    def on_body(self, data: bytes) -> None:
        """Take a part of the body."""

    def on_end(self, trailers: Fields) -> None:
        """Called when the answer is complete."""

    def on_lost(self, error: Exception) -> None:
        """Called when the rest of the answer will not come."""


class Origin(NamedTuple):
    """Where a server is."""

    scheme: str
    host: str
    port: int
    path: str
    """What precedes the path of every request."""
    name: str
    """The name that its certificate must have, and that it is asked by."""

    @property
    def is_secure(self) -> bool:
        """Whether connections use TLS."""
        return self.scheme.endswith("s")

    @property
    def authority(self) -> str:
        """Return the value of the Host field."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        usual = 443 if self.is_secure else 80
        return name if self.port == usual else f"{name}:{self.port}"


def parse_origin(url: str, flag: str = "--upstream", kind: str = "http") -> Origin:
    """Return the origin that a URL names: http://HOST[:PORT][/PATH] or https://...

    A URL over TLS may end with #NAME: its certificate then must have that name.

    Args:
        url: to read.
        flag: the option that has it, for messages.
        kind: the scheme; the same with an s is over TLS.

    Raises:
        UserError: naming the option, if it is no such URL.
    """
    try:
        parts = urlsplit(url)
        port = {"http": 80, "https": 443}.get(parts.scheme) if parts.port is None else parts.port
        known = parts.scheme in (kind, f"{kind}s")
    except ValueError as error:
        raise UserError(f"{flag}: {url!r} is not a URL: {error}") from error
    if not known or not port or not parts.hostname or parts.query:
        raise UserError(f"{flag}: {url!r} is not {kind}://HOST:PORT or {kind}s://HOST:PORT")
    if parts.fragment and parts.scheme == kind:
        raise UserError(f"{flag}: {url!r}: only {kind}s:// takes #NAME")
    if parts.username is not None:
        raise UserError(f"{flag}: {parts.hostname}: a URL may not contain a password")
    for name in filter(None, (parts.hostname, parts.fragment)):
        if not _is_host(name):
            raise UserError(f"{flag}: {url!r}: {name!r} is not a host name")
    path = quote(parts.path.rstrip("/"), safe="/%~!$&'()*+,;=:@")
    return Origin(parts.scheme, parts.hostname, port, path, parts.fragment or parts.hostname)


def _is_host(name: str) -> bool:
    """Return whether a text may be a host's name or address, whoever has it.

    Resolving another one is no OSError, as that of an unknown name is.
    """
    try:
        name.encode("idna")  # each part between dots has 1 to 63 characters
    except UnicodeError:
        return False
    return name.isprintable() and " " not in name


async def open_socket(origin: Origin, resolver: Resolver) -> socket.socket:
    """Return a connection to an origin on which nothing was sent.

    Raises:
        OSError: if there is none.
    """
    found = await resolver.resolve(origin.host, origin.port)
    return await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS)


class Connection(asyncio.Protocol):
    """One connection, at one request at a time; its client keeps it when an answer is complete."""

    transport: asyncio.Transport

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self.receiver: Receiver | None = None
        """Takes the answer; None between two requests."""
        self.used = 0
        """Requests that were sent."""
        self.made = self.since = client.loop.time()
        """When it was made, and used last."""
        self.sound = True
        """Whether it may be kept."""
        self._poll: select.poll | None = None
        self._method = b""
        self._block, self._heads = Block(), HeadReader(read_response)
        self._interim = 0
        """Heads that came before the answer's own."""
        self._rest = b""
        """What came, and is read in the next turn."""
        self._is_paused = False
        """Whether the receiver wants nothing more for now."""
        self._heard = False
        """Whether anything of the answer is here."""
        self._head: ResponseHead | None = None
        self._chunks: Chunks | None = None
        self._left: int | None = 0
        """Bytes of the body that are to come; None: until the connection closes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        descriptor = transport.get_extra_info("socket").fileno()
        if descriptor >= 0 and hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)

    def is_quiet(self) -> bool:
        """Return whether another request may be written: nothing came that is not read yet."""
        if not self.sound or self.transport.is_closing():
            return False
        return self._poll is None or not self._poll.poll(0)

    def send(self, receiver: Receiver, method: bytes, request: Sequence[bytes]) -> None:
        """Write a request, in parts; its answer goes to a receiver.

        Raises:
            ConnectionError: if the connection is closed; nothing was written then.
        """
        if self.transport.is_closing():
            raise ConnectionError("the connection was closed")
        self.receiver, self._method, self._heard, self._interim = receiver, method, False, 0
        self.used += 1
        self.transport.writelines(request)

    def pause(self) -> None:
        """Read nothing more for now."""
        self._is_paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self._is_paused = False
        if not self.transport.is_closing() and not self._rest:
            self.transport.resume_reading()

    def abort(self) -> None:
        """Cancel what is under way, and close; the receiver hears nothing more."""
        self.receiver, self.sound = None, False
        self.transport.abort()

    def _fail(self, error: Exception) -> None:
        receiver, self.receiver, self.sound = self.receiver, None, False
        self.transport.abort()
        if receiver is not None:
            receiver.on_lost(error)

    # What the server sends

    def data_received(self, data: bytes) -> None:
        if self.receiver is None:
            self._fail(ConnectionError("it sent unrequested bytes"))
            return
        self._heard = True
        try:
            at = self._read_head(data) if self._head is None else 0
            if at < len(data) and self.receiver is not None:
                at = self._read_body(data, at)
        except BadMessage as error:
            self._fail(Broken(f"its answer is not HTTP/1.1: {error}"))
            return
        if at < len(data) and self.receiver is not None:  # other connections have their turns
            self._rest = data[at:]
            self.transport.pause_reading()
            self.client.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        rest, self._rest = self._rest, b""
        if self.receiver is None:
            return
        self.data_received(rest)
        if not self._is_paused:
            self.resume()

    def _read_head(self, data: bytes) -> int:
        """Read the answer's head, and those before it; return the position behind."""
        at = 0
        while at < len(data):
            block, at = self._block.take(data, at)
            if not block:
                break
            head = self._heads.read(block)
            if head.status >= 200:
                return self._begin(head, data, at)
            if head.status == 101:
                raise BadMessage("it switched to another protocol")
            self._interim += 1
            if self._interim > MOST_INTERIM:
                raise BadMessage(f"more than {MOST_INTERIM} heads precede it")
        return at

    def _begin(self, head: ResponseHead, data: bytes, at: int) -> int:
        """Hand a head on, and end the answer if it has no body; return the position behind."""
        self._head, self._chunks, self._left = head, None, 0
        if head.has_body(self._method):
            if head.chunked:
                self._chunks = Chunks()
            else:
                self._left = head.length
                if head.length is None:
                    self.sound = False
        assert self.receiver is not None
        self.receiver.on_head(head)
        if self._left == 0 and self._chunks is None:
            return self._finish([], data, at)
        return at

    def _read_body(self, data: bytes, at: int) -> int:
        receiver, chunks = self.receiver, self._chunks
        assert receiver is not None
        if chunks is not None:
            pieces, at = chunks.feed(data, at)
            if pieces:
                receiver.on_body(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            return self._finish(chunks.trailers, data, at) if chunks.done else at
        if self._left is None:
            receiver.on_body(data[at:])
            return len(data)
        piece = data[at : at + self._left]
        self._left -= len(piece)
        receiver.on_body(piece)
        at += len(piece)
        return at if self._left else self._finish([], data, at)

    def _finish(self, trailers: Fields, data: bytes = b"", at: int = 0) -> int:
        """End an answer, and keep the connection if another request may be sent.

        Args:
            trailers: behind the body.
            data: what came; none of it is read after this.
            at: where the answer ends in it.
        """
        receiver, head = self.receiver, self._head
        self.receiver = self._head = self._chunks = None
        if receiver is None or head is None:
            return len(data)
        self.since = self.client.loop.time()
        unread = self.transport.get_write_buffer_size() > 0  # answered before it was read
        self.sound = self.sound and head.keeps and at == len(data) and not unread
        if self.sound:
            if self._is_paused:  # its last reader was slow
                self.resume()
            self.client.keep(self)
        else:
            self.transport.abort()
        receiver.on_end(trailers)
        return len(data)

    def eof_received(self) -> None:
        """Close, as the server does; `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.gone(self)
        if self._left is None and self._head is not None and exc is None:
            self._finish([])
        said = "the connection was closed" if exc is None else described(exc)
        self._fail(Broken(said, stale=self.used > 1 and not self._heard))


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    head: ResponseHead
    body: bytes

    def field(self, name: str) -> str:
        """Return a field's value; "" if there is none."""
        return self.head.known.get(name.lower().encode(), b"").decode("latin-1")


class Whole:
    """Receives an answer as a whole, with a body of at most MOST_ANSWER bytes."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.size = connection, 0
        self.done: asyncio.Future[Answer] = connection.client.loop.create_future()
        self.body: list[bytes] = []

    def on_head(self, head: ResponseHead) -> None:
        self.head = head

    def on_body(self, data: bytes) -> None:
        self.body.append(data)
        self.size += len(data)
        if self.size > MOST_ANSWER:
            self.connection.abort()
            self.on_lost(Broken(f"its answer takes more than {MOST_ANSWER} bytes"))

    def on_end(self, trailers: Fields) -> None:
        if not self.done.done():
            self.done.set_result(Answer(self.head.status, self.head, b"".join(self.body)))

    def on_lost(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class HttpClient:
    """Sends requests to one server, on connections that it keeps.

    Args:
        origin: where the server is.
        context: of TLS; None: the origin's scheme decides, with this machine's certificates.
        resolver: finds the addresses of its name; None: one of its own.
        connect: seconds in which a connection must be there.
    """

    def __init__(
        self,
        origin: Origin,
        context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        connect: float = CONNECT_TIMEOUT,
    ) -> None:
        if origin.is_secure and context is None:
            context = ssl.create_default_context()
        self.origin, self.connect_timeout = origin, connect
        self.context = context if origin.is_secure else None
        self.resolver = resolver or Resolver()
        self.loop = asyncio.get_running_loop()
        self.authority, self.path = origin.authority.encode(), origin.path.encode()
        self._idle: deque[Connection] = deque()
        """The one that was used last is the last."""
        self._closed = False

    @property
    def idle(self) -> int:
        """How many idle connections there are."""
        return len(self._idle)

    def keep(self, connection: Connection) -> None:
        """Keep a connection for another request, and close those that were idle for too long."""
        if self._closed:
            connection.transport.close()
            return
        self._idle.append(connection)
        oldest = self._idle[0]
        if self.loop.time() - oldest.since > LONGEST_IDLE:
            self._idle.popleft().transport.close()

    def gone(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        if connection.receiver is None:
            with contextlib.suppress(ValueError):
                self._idle.remove(connection)

    def kept(self, longest_idle: float = LONGEST_IDLE) -> Connection | None:
        """Take an idle connection out, to be written on at once; None: there is none.

        Args:
            longest_idle: seconds that it may have been idle.
        """
        now = self.loop.time()
        while self._idle:
            if now - self._idle[-1].since > longest_idle:
                return None
            connection = self._idle.pop()
            if now - connection.made < OLDEST and connection.is_quiet():
                return connection
            connection.transport.abort()
        return None

    async def connect(self, seconds: float | None = None) -> Connection:
        """Return a new connection.

        Raises:
            OSError: if there is none in time.
        """
        limit = self.connect_timeout if seconds is None else min(seconds, self.connect_timeout)
        try:
            async with asyncio.timeout(limit):
                return await self._connect()
        except TimeoutError:
            raise OSError(f"no connection within {limit:.3g} s") from None

    async def _connect(self) -> Connection:
        origin, secure = self.origin, self.context is not None
        there = await open_socket(origin, self.resolver)
        _, connection = await self.loop.create_connection(
            lambda: Connection(self),
            sock=there,
            ssl=self.context,
            server_hostname=origin.name if secure else None,
            ssl_handshake_timeout=self.connect_timeout if secure else None,
        )
        return connection

    async def ask(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """Return the whole answer to a request that may be repeated.

        It is written once more if a kept connection turns out to be closed.

        Args:
            method: of HTTP.
            path: behind that of the origin.
            seconds: for all of it.
            body: None: there is none.
            headers: other fields than Host and Content-Length.

        Raises:
            Broken: if the connection broke while the server may have handled it.
            OSError: if the server cannot be reached, or there is no answer in time.
        """
        fields = [(b"Host", b" " + self.authority)]
        fields += [
            (name.encode("latin-1"), b" " + text.encode("latin-1")) for name, text in headers
        ]
        if body is not None:
            fields.append((b"Content-Length", b" %d" % len(body)))
        verb = method.encode()
        start = b"%b %b%b HTTP/1.1\r\n" % (verb, self.path, path.encode("latin-1"))
        if any(b"\r" in line or b"\n" in line for field in fields for line in field):
            raise OSError("a header has several lines")
        request = [start + write_fields(fields) + b"\r\n", *([body] if body else ())]
        until = self.loop.time() + seconds
        connection = self.kept()
        while True:
            again = connection is not None
            if connection is None:
                connection = await self.connect(until - self.loop.time())
            whole = Whole(connection)
            timer = self.loop.call_at(until, self._late, whole, seconds)
            try:
                connection.send(whole, verb, request)
                return await whole.done
            except Broken as error:
                if not (again and error.stale):
                    raise
                connection = None
            finally:
                timer.cancel()
                if connection is not None and connection.receiver is whole:  # cancelled
                    connection.abort()

    def _late(self, whole: Whole, seconds: float) -> None:
        whole.connection.abort()
        whole.on_lost(Broken(f"no answer within {seconds:.3g} s"))

    def close_idle(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().transport.abort()

    def close(self) -> None:
        """Close its connections; those that are at a request when that ends."""
        self._closed = True
        self.close_idle()


def described(error: BaseException) -> str:
    """Return what is wrong with a connection, in a few words."""
    if isinstance(error, OSError):
        if error.errno and error.errno > 0 and not isinstance(error, ssl.SSLError):
            return os.strerror(error.errno)
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__
