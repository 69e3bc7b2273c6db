"""Bounds on what clients may take before their token is looked at: connections, headers, time."""

from __future__ import annotations

import asyncio
import logging
from array import array
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from codedinvnet.net.logs import Quiet
from codedinvnet.serving.api.bodies import GONE

LONGEST_HEAD = 64 * 1024
"""Bytes of a request's line and headers, or of what follows a chunk of its body (extensions,
trailers), in addition to those that come together with the first one."""
HEAD_TIMEOUT = 10.0
"""Seconds in which they must be here."""


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


class Corked:
    """A transport that sends the head of an answer together with its body, in one packet.

    Args:
        transport: what sends them; it has everything else.
    """

    def __init__(self, transport: Any) -> None:
        self._transport, self._head = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send data, or keep a head for what follows within this turn of the event loop."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        """Send what is kept, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            data, self._head = self._head, b""
            self._transport.write(data)


class BoundedHttp(HttpToolsProtocol):
    """One connection: it is closed if its headers are too long, or too long on their way.

    Trailers are counted and dropped. Requests find in their scope what ends with the connection.
    """

    most = 1 << 14
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

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.parser = RequestParser(self)
        self.gone: asyncio.Future[None] = self.loop.create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        corked: Any = Corked(transport)
        super().connection_made(corked)
        if len(self.connections) > self.most:
            reason = f"{self.most} are open: a proxy may limit those of one client"
            self.refused.log("connection refused", logging.WARNING, reason=reason)
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        if not self.gone.done():
            self.gone.set_result(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > LONGEST_HEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: Any = {GONE: self.gone}
        self.scope["extensions"] = extensions
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
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.again is None:
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
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
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self._too_late)  # after its answer
        else:
            self.transport.abort()
