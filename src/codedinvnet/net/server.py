"""The HTTP/1.1 server of the gateway and the service.

Requests of one connection are answered in order, one at a time. What comes meanwhile waits, and
is not read beyond a bound. Whatever is malformed, too large or too slow is refused, and ends its
connection.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import socket
import ssl
import time
from collections import deque
from typing import Protocol

from codedinvnet.net.answers import HIGH, LOW, Answers, Reply
from codedinvnet.net.background import Background
from codedinvnet.net.http1 import BadMessage, RequestHead
from codedinvnet.net.listening import BACKLOG, address
from codedinvnet.net.logs import Quiet
from codedinvnet.net.memory import Account, Memory
from codedinvnet.net.requests import Request, RequestReader
from codedinvnet.net.tls import Certificate, follow

HANDSHAKE = 10.0
"""Seconds for a client's TLS handshake."""
HEAD_TIMEOUT, BODY_TIMEOUT = 10.0, 60.0
"""Seconds for a request's head, and for each LEAST_PROGRESS of its body, or the rest of it."""
LEAST_PROGRESS = 1 << 16
"""Bytes of a body. No network is as slow as 1 KB/s for a minute; a client that means to be is."""
LONGEST_GROWTH = 10.0
"""Seconds in which a body must grow by as much as it holds already while memory is short: whoever
holds most for the least progress goes first."""
KEEP_ALIVE = 75.0
"""Seconds that an idle connection stays open."""
UNREAD = 60.0
"""Seconds for which a client may take nothing of its answer."""
LAST_REQUESTS = 1.0
"""Seconds for which idle connections stay open while the server drains: a client may be about to
send a request, and learns from its answer that it is the last."""
STRANGERS = 8
"""What clients hold before they show a token, of the memory: a head or two for each of some
hundred; a head is usually complete when it comes."""
CROWD = 64
"""One of so many connections is closed at once to make room: looking for them is rare then."""
SWEEP = 1.0
"""Seconds between two looks for connections that are too slow."""
MOST_AHEAD = 1 << 16
"""Bytes of further requests that wait for the answer to the one before."""
LINGER = 2.0
"""Seconds for which a client may go on sending after the last answer; nothing of it is read."""
STILL_THERE = (0.0, 0.05, 0.2, 1.0)
"""Seconds after a client has sent its last byte, at which it gets `100 Continue`. One that is gone
resets the connection, which shows when the next one is sent."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Call(Protocol):
    """A request that is answered later."""

    def gone(self) -> None:
        """Called when the client hangs up."""

    def pause(self) -> None:
        """Called when the client reads its answer slowly."""

    def resume(self) -> None:
        """Called when the client has read what waited for it."""


class Handler(Protocol):
    """What answers requests."""

    def most_body(self, head: RequestHead) -> int:
        """Return how many bytes a request's body may have."""

    def precheck(self, head: RequestHead) -> Reply | None:
        """Return why a request is refused before its body is read; None if it is not."""

    def trusts(self, head: RequestHead) -> bool:
        """Return whether a request comes from a client that may use this server."""

    def handle(self, client: Answers, request: Request) -> Call | None:
        """Answer a request now, and return None; or return what answers it later.

        The handler gives the memory that the body takes back.
        """

    def replied(self, head: RequestHead | None, status: int, client: Answers) -> None:
        """Called after an answer of the server's own; the head is None if it was malformed."""


class ClientConnection(asyncio.Protocol):
    """A client's connection.

    Args:
        server: has it among its connections.

    Attributes:
        account: counts what it holds besides bodies.
        call: the request that is being answered; None without one.
        is_answering: whether a request is complete, and its answer is not.
        since: when it became idle, or a part of a request came.
        is_stranger: whether no request has shown yet that the client may use this server.
    """

    __slots__ = (
        "_ahead", "_ahead_size", "_at", "_came", "_eof", "_has_turn", "_is_ending", "_mark",
        "_pace", "_refusal", "_seen", "account", "answers", "call", "is_answering",
        "is_stranger", "reader", "server", "since", "transport",
    )  # fmt: skip
    transport: asyncio.Transport

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.account, self.is_stranger = Account(server.strangers), True
        most_body = server.handler.most_body
        self.reader = RequestReader(server.memory, self.account, most_body, self._accepts)
        self.answers = Answers(self)
        self.call: Call | None = None
        self._refusal: Reply | None = None
        self.is_answering = self._is_ending = self._eof = self._has_turn = False
        self._ahead: deque[bytes] = deque()
        self._at = self._ahead_size = 0
        """What is not read yet: from where on in its first part, and how many bytes."""
        self.since = self._came = time.monotonic()
        """When a part of a request came last; and when the request's first did."""
        self._mark = self._seen = 0
        """Bytes of the body at `since`, and when its growth was measured last."""
        self._pace = 0.0
        """Bytes a second by which the body grew lately."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.set_write_buffer_limits(HIGH, LOW)
        name = transport.get_extra_info("peername")
        secure = transport.get_extra_info("ssl_object") is not None
        self.answers.peer = (str(name[0]) if name else "unknown"), secure
        self.server.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.reader.drop()
        self.answers.count(0)
        self._drop_ahead()
        call, self.call = self.call, None
        if call is not None:
            call.gone()

    def pause_writing(self) -> None:
        self.answers.pause()

    def resume_writing(self) -> None:
        self.answers.resume()
        self._await_turn()

    def eof_received(self) -> bool:
        """Answer a client that has sent all it has, unless it is gone."""
        self._eof = True
        if not self.is_answering and not self._ahead:
            return False
        head = self.reader.head
        for seconds in STILL_THERE if head is not None and not head.is_old else ():
            self.server.loop.call_later(seconds, self._ask_whether_there)
        return self.transport.get_extra_info("ssl_object") is None

    def _ask_whether_there(self) -> None:
        if self.is_answering and not self.answers.is_begun and not self.transport.is_closing():
            self.transport.write(CONTINUE)

    def abort(self) -> None:
        """Close at once."""
        self.call, self._is_ending = None, True
        self.transport.abort()

    def close(self) -> None:
        """Close once the client has what waits for it, though its answer has no end."""
        self.call, self._is_ending = None, True
        self.transport.close()

    def is_overdue(self, now: float) -> str:
        """Return which limit the client has exceeded, "" if none."""
        waiting, answers = self.transport.get_write_buffer_size(), self.answers
        if waiting < answers.waiting or not waiting:
            answers.progress = now
        answers.count(waiting)
        if waiting and now - answers.progress > UNREAD:
            return "unread"
        if self.is_answering or self._is_ending or self._ahead:
            return ""
        age, reader = now - self.since, self.reader
        if reader.head is not None:
            late = now - self._came > self.server.body_seconds
            return "body" if late or age > BODY_TIMEOUT else ""
        if reader.is_in_head:
            return "head" if age > HEAD_TIMEOUT else ""
        return "idle" if age > KEEP_ALIVE else ""

    @property
    def is_dispensable(self) -> bool:
        """Whether it may be closed when there are too many: nobody waits for an answer."""
        is_idle = self.is_stranger or self.reader.is_idle
        return is_idle and not (self.is_answering or self._ahead or self.transport.is_closing())

    def growth(self) -> float:
        """Return by what share its body grew in the last seconds; infinity without one.

        It is called once in SWEEP.
        """
        reader = self.reader
        if self.is_answering or self._is_ending or not reader.size:
            return math.inf
        self._pace = (self._pace + (reader.size - self._seen) / SWEEP) / 2
        self._seen = reader.size
        return self._pace / reader.size

    def close_if_idle(self) -> None:
        """Close unless a request, or a part of one, is here, in the socket's buffer as well."""
        transport = self.transport
        is_idle = self.reader.is_idle and not (self.is_answering or self._ahead or self._is_ending)
        if is_idle and not transport.is_closing() and not is_readable(transport):
            self._close()

    # Requests

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        if self._ahead or self.is_answering or self.answers.is_paused:
            self._ahead.append(data)
            self._hold(len(data))
            if self.is_stranger:
                self.server.bound_strangers()
        else:
            self._read(data, 0)

    @property
    def _may_read(self) -> bool:
        """Whether the next request may be read: the client has the answer to the one before."""
        return not self.is_answering and not self.answers.is_paused

    def _hold(self, size: int) -> None:
        """Count bytes that wait, and receive no more than a bound."""
        self._ahead_size += size
        self.account.take(size)
        if self._ahead_size > MOST_AHEAD and self.transport.is_reading():
            self.transport.pause_reading()

    def _read(self, data: bytes, at: int) -> None:
        """Read one request at most, and have it answered once it is complete."""
        reader = self.reader
        if reader.is_idle:
            self.since = time.monotonic()
            self._mark = self._seen = 0
            self._pace = 0.0
        try:
            at = reader.feed(data, at)
        except BadMessage as error:
            self.answers.refuse(error.status, str(error), int(error.status == 503), closes=True)
            return
        if reader.size - self._mark >= LEAST_PROGRESS:
            self.since, self._mark = time.monotonic(), reader.size
        if at < len(data) and not self._is_ending:
            self._ahead.appendleft(data)
            self._at = at
            self._hold(len(data) - at)
        if self._refusal is not None:
            refusal, self._refusal, head = self._refusal, None, reader.head
            assert head is not None
            self.answers.reply(refusal, closes=head.chunked or bool(head.length))
        elif reader.is_complete:
            self.is_answering = True
            self.call = self.server.handler.handle(self.answers, reader.take(self._came))
        else:
            self._await_turn()
        if self.is_stranger:
            self.server.bound_strangers()

    def _await_turn(self) -> None:
        """Go on with what waits once other connections have had their turns."""
        if not self._ahead:
            if self._eof and not self.is_answering:
                self._close()
        elif self._may_read and not self._has_turn:
            self._has_turn = True
            self.server.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._has_turn = False
        if not self._ahead or not self._may_read or self.transport.is_closing():
            return
        data, at = self._ahead.popleft(), self._at
        self._at = 0
        self._ahead_size -= len(data) - at
        self.account.give(len(data) - at)
        self._read(data, at)
        if self._ahead_size <= MOST_AHEAD and not self.transport.is_reading():
            self.transport.resume_reading()

    def _drop_ahead(self) -> None:
        self.account.give(self._ahead_size)
        self._ahead.clear()
        self._at = self._ahead_size = 0

    def _accepts(self, head: RequestHead, waits: bool) -> bool:
        """Return whether a request is read on, and tell a client that waits for this."""
        self._came, self.since = self.since, time.monotonic()
        self._refusal = self.server.handler.precheck(head)
        if self.is_stranger and self._refusal is None and self.server.handler.trusts(head):
            self.is_stranger = False
            self.account.move(self.server.memory)
        if waits and self._refusal is None:
            self.transport.write(CONTINUE)
        return self._refusal is None

    # Answers

    def is_kept(self) -> bool:
        """Return whether the connection stays open behind the answer."""
        head = self.reader.head
        if head is None or not head.keeps:
            return False
        return bool(self._ahead) or not (self._eof or self.server.is_draining)

    def done(self, is_kept: bool) -> None:
        """An answer is complete: read the next request, or close."""
        self.call, self.is_answering, self.since = None, False, time.monotonic()
        self.reader.drop()
        if not is_kept:
            self._close()
            return
        if self.server.is_closing:  # which this answer's head didn't say yet
            self.server.loop.call_later(LAST_REQUESTS, self.close_if_idle)
        if self._ahead or self._eof:
            self._await_turn()

    def _close(self) -> None:
        """Close once the client has the answer, though it may still be sending."""
        transport = self.transport
        self._is_ending = True
        self._drop_ahead()
        if self._eof or transport.is_closing() or not transport.can_write_eof():
            transport.close()
        else:  # closing with bytes unread would reset the connection, and the answer be lost
            transport.write_eof()
            transport.resume_reading()  # what still comes is dropped, and the client's end noticed
            self.server.loop.call_later(LINGER, transport.close)


class HttpServer:
    """The connections of clients.

    Args:
        handler: answers requests.
        memory: counts what they hold.
        most_connections: those beyond are closed at once.
        body_seconds: in which a request's body must be here; however slow it may be by default.
    """

    refused = Quiet()
    """Logs connections that are too many."""

    def __init__(
        self,
        handler: Handler,
        memory: Memory,
        most_connections: int,
        body_seconds: float = math.inf,
    ) -> None:
        self.handler, self.memory, self.body_seconds = handler, memory, body_seconds
        self.most_connections = most_connections
        self.strangers = Memory(memory.most // STRANGERS)
        """Counts what clients hold before they have shown that they may use this server."""
        self.connections: set[ClientConnection] = set()
        self.is_draining = self.is_closing = False
        self.loop = asyncio.get_running_loop()
        self._background = Background()
        self._listening: asyncio.AbstractServer | None = None

    def add(self, connection: ClientConnection) -> None:
        """Take a connection in; if there are too many, close idle ones, or this one."""
        if len(self.connections) >= self.most_connections:
            idle = sorted(
                (other for other in self.connections if other.is_dispensable), key=_least_useful
            )
            for other in idle[: 1 + self.most_connections // CROWD]:
                other.abort()
            if not idle:
                connection.transport.abort()
            reason = f"{self.most_connections} are open: a proxy may limit those of one client"
            what = "connection refused" if not idle else "idle connections closed"
            self.refused.log(what, logging.WARNING, reason=reason)
        self.connections.add(connection)
        if self.is_closing:
            self.loop.call_later(LAST_REQUESTS, connection.close_if_idle)

    def bound_strangers(self) -> None:
        """Close what strangers hold longest if it is too much."""
        most = self.strangers.most
        if self.strangers.used <= most:
            return
        holding = [each for each in self.connections if each.is_stranger and each.account.held]
        holding = [each for each in holding if not each.transport.is_closing()]
        left = sum(each.account.held for each in holding)
        for each in sorted(holding, key=_least_useful) if left > most else ():
            left -= each.account.held
            each.abort()
            if left <= most // 2:
                break

    async def listen(self, listener: socket.socket, certificate: Certificate | None) -> str:
        """Take connections from a socket from now on; return its URL.

        Args:
            listener: the socket.
            certificate: None: without TLS.
        """
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.chain, certificate.key)
            context.set_alpn_protocols(["http/1.1"])
            self._background.spawn(follow(certificate, context, "HTTP"))
        self._listening = await self.loop.create_server(
            lambda: ClientConnection(self),
            sock=listener,
            ssl=context,
            ssl_handshake_timeout=None if context is None else HANDSHAKE,
            backlog=BACKLOG,
        )
        self._background.spawn(self._sweep_on())
        return address(listener, context is not None)

    async def _sweep_on(self) -> None:
        """Look for slow clients, for ever."""
        while True:
            await asyncio.sleep(SWEEP)
            now, slow = time.monotonic(), list[tuple[float, ClientConnection]]()
            for number, connection in enumerate(list(self.connections)):
                if number % 1000 == 999:
                    await asyncio.sleep(0)
                overdue = connection.is_overdue(now)
                if overdue == "unread":
                    connection.transport.abort()
                elif overdue in ("head", "body"):
                    connection.answers.refuse(
                        408, f"the request's {overdue} took too long", closes=True
                    )
                elif overdue:
                    connection.close_if_idle()
                growth = connection.growth()
                if growth < 1 / LONGEST_GROWTH:
                    slow.append((growth, connection))
            self._make_room(slow)

    def _make_room(self, slow: list[tuple[float, ClientConnection]]) -> None:
        """Give up slow bodies, the slowest first, while memory is short."""
        for _, connection in sorted(slow, key=lambda one: one[0]):
            if not self.memory.is_short:
                return
            reason = "memory is short, and the request's body is slow: try again later"
            connection.answers.refuse(503, reason, 1, closes=True)

    def announce_draining(self) -> None:
        """Say with each answer that it is its connection's last; take new ones all the same."""
        self.is_draining = True

    def close(self) -> None:
        """Take no more connections, and close those that are here after their last requests."""
        if self.is_closing:
            return
        self.is_draining = self.is_closing = True
        if self._listening is not None:
            self._listening.close()
        for connection in self.connections:
            self.loop.call_later(LAST_REQUESTS, connection.close_if_idle)

    async def stop(self, seconds: float) -> None:
        """Wait until all connections are closed, and abort those that are left after some time."""
        self.close()
        until = time.monotonic() + seconds
        while self.connections and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.transport.abort()
        await self._background.stop()


def _least_useful(connection: ClientConnection) -> tuple[bool, float]:
    """Order connections that may be closed: strangers first, and those that did least lately."""
    return not connection.is_stranger, connection.since


def is_readable(transport: asyncio.BaseTransport) -> bool:
    """Return whether a connection's socket has bytes, or an end, that were not read yet."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
