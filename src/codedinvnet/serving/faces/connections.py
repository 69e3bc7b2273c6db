"""Bounds on what clients may take before their token is looked at: connections, headers, time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from array import array
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from codedinvnet.serving.logs import Quiet

LONGEST_HEAD = 64 * 1024
"""Bytes of a request's line and headers, or of what follows a chunk of its body (extensions,
trailers), beside those that come together with the first one."""
HEAD_TIMEOUT = 10.0
"""Seconds in which they must be here."""
UNREAD = 60.0
"""Seconds for which a client may take nothing of what is sent to it."""
FILES_OF_A_WORKER = 8
"""Open files that a worker may take in this process, with the next one that is starting, beside
one for each of its slots: an upstream's connections."""
OTHER_FILES = 64
"""Open files beside connections and workers."""
FEWEST_CONNECTIONS, MOST_CONNECTIONS = 16, 1 << 14
MOST_FILES = 1 << 20
"""Open files that are asked for; each costs nothing before it is open."""
MOST_PIPELINED = 64
"""Requests of one connection that may wait for their turn, behind the one that is at work."""
STILL_THERE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Said to a client that sends no more. One that has left refuses it, and is noticed."""
ASKED_AFTER = (0.0, 0.2, 1.0)
"""Seconds after which it is said; the first refusal shows when the next one is sent."""


def allow_files() -> None:
    """Let this process open as many files as it may allow itself, up to `MOST_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has limits of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def connection_limit(workers: int, slots: int = 1) -> int:
    """Return how many connections there may be, so that workers can be asked and replaced.

    Args:
        workers: their number.
        slots: how many tasks each may be at.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    left = files - OTHER_FILES - workers * (FILES_OF_A_WORKER + slots)
    return min(max(FEWEST_CONNECTIONS, left), MOST_CONNECTIONS)


class TooManyAtOnce(Exception):
    """More requests than may wait for their turn came at once; what else came is not parsed."""


class RequestParser(httptools.HttpRequestParser):
    """Reads a request that offers another protocol as one that does not.

    httptools takes what follows the headers of such a request for the other protocol's. Java's
    client and `curl --http2` make the offer (h2c), and send the body all the same.
    """

    def __init__(self, protocol: BoundedHttp) -> None:
        super().__init__(protocol)
        self.protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        feed = super().feed_data
        while True:
            try:
                feed(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                head, self.protocol.again = self.protocol.again, None
                if head is None:  # CONNECT
                    raise
                parser = self.protocol.parser = RequestParser(self.protocol)
                feed = super(RequestParser, parser).feed_data
                feed(head)
                data = memoryview(data)[upgrade.args[0] :]


class BoundedHttp(HttpToolsProtocol):
    """One connection: it is closed if its headers are too long, or too long on their way.

    Trailers are counted and dropped. What comes of a request that was answered before it was here
    does not keep the connection open. A client that closes its side after a request is answered.
    One of whose requests more than `MOST_PIPELINED` wait for their turn is cut off.
    """

    most = MOST_CONNECTIONS
    """Connections; those beyond are closed at once."""
    refused = Quiet()
    """Logs these."""
    again: bytes | None = None
    """The line and headers of a request without its offer of another protocol, to be read next."""
    _in_head = True
    """Whether a request's line or headers are to come."""
    _unread = 0
    """Bytes since a request began, its headers were complete, or a part of its body came."""
    _timer: asyncio.TimerHandle | None = None
    _asking: tuple[asyncio.TimerHandle, ...] = ()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = RequestParser(self)
        self._earlier: deque[RequestResponseCycle] = deque()
        """Requests that were not answered yet when the next one came (pipelining)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            reason = f"{self.most} are open: a proxy may limit those of one client"
            self.refused.log("connection refused", logging.WARNING, reason=reason)
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        for timer in self._asking:
            timer.cancel()
        for cycle in self._earlier:  # uvicorn tells the last one alone
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Tell whether the connection stays open: a request is here, and not answered yet."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        # Not within the answer to an earlier request, and to no client of HTTP/1.0.
        if not self.pipeline and cycle.scope["http_version"] == "1.1":
            self._asking = tuple(self.loop.call_later(s, self._ask) for s in ASKED_AFTER)
        return True

    def _ask(self) -> None:
        if not self.cycle.response_started:
            self.transport.write(STILL_THERE)

    def data_received(self, data: bytes) -> None:
        idle = self.timeout_keep_alive_task
        self._unread += len(data)
        super().data_received(data)
        if self._unread > LONGEST_HEAD:
            self.transport.abort()
        elif idle is not None and not self._in_head and self.cycle.response_complete:
            self.timeout_keep_alive_task = self.loop.call_at(
                idle.when(), self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:  # the first one is expected from the connection's beginning on
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        kept = [header for header in self.headers if header[0] != b"upgrade"]
        if len(kept) < len(self.headers) and self.parser.should_upgrade():
            line = b"%b %b HTTP/%b" % (
                self.parser.get_method(),
                self.url,
                self.parser.get_http_version().encode(),
            )
            lines = [line, *(name + b": " + value for name, value in kept), b"", b""]
            self.again = b"\r\n".join(lines)
            return
        self._end_head()
        self._queue()
        super().on_headers_complete()

    def _queue(self) -> None:
        """Take note of the request before one whose headers are here, if it is not answered yet.

        Raises:
            TooManyAtOnce: if too many are not.
        """
        earlier = self._earlier
        while earlier and earlier[0].response_complete:  # they are answered in their order
            earlier.popleft()
        if self.cycle is None or self.cycle.response_complete:
            return
        if len(earlier) == MOST_PIPELINED:
            reason = f"{MOST_PIPELINED} of its requests wait for their turn already"
            self.refused.log("connection refused", logging.WARNING, reason=reason)
            self.transport.abort()
            raise TooManyAtOnce
        earlier.append(self.cycle)

    def on_message_complete(self) -> None:
        if self.again is None:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        held = self.cycle.body
        if not held:  # the first part is handed over as it is, if it is taken before the next one
            self.cycle.body = b""  # type: ignore[assignment]
        elif isinstance(held, bytes):
            self.cycle.body = bytearray(held)
        super().on_body(body)

    def _expect_head(self) -> None:
        self._in_head, self._unread = True, 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self._too_late)

    def _end_head(self) -> None:
        self._in_head, self._unread = False, 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._timer = self.loop.call_later(
                HEAD_TIMEOUT, self._too_late
            )  # not before its answer
        else:
            self.transport.abort()
