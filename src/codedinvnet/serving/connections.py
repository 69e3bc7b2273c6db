"""Bounds on what clients may take before their token is looked at: connections, headers, time."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 64 * 1024
"""Bytes of a request's line and headers, or of what follows a chunk of its body (extensions,
trailers), beside those that come together with the first one."""
HEAD_TIMEOUT = 10.0
"""Seconds in which they must be here."""
FILES_OF_A_WORKER = 8
"""Open files that a worker may take in this process, with the next one that is starting."""
OTHER_FILES = 64
"""Open files beside connections and workers."""
FEWEST_CONNECTIONS = 16


def connection_limit(workers: int) -> int:
    """Return how many connections there may be, so that workers can still be replaced."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        files = 1 << 20
    return max(FEWEST_CONNECTIONS, files - OTHER_FILES - FILES_OF_A_WORKER * workers)


class BoundedHttp(HttpToolsProtocol):
    """One connection: it is closed if its headers are too long, or too long on their way.

    Trailers are counted and dropped. What comes of a request that was answered before it was here
    does not keep the connection open.
    """

    most = 1 << 20
    """Connections; those beyond are closed at once."""
    _in_head = True
    """Whether a request's line or headers are to come."""
    _unread = 0
    """Bytes since a request began, its headers were complete, or a part of its body came."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

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
        self._end_head()
        super().on_headers_complete()

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
            self._timer = self.loop.call_later(
                HEAD_TIMEOUT, self._too_late
            )  # not before its answer
        else:
            self.transport.abort()
