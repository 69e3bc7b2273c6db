"""Bounds on what clients may take before their token is looked at: connections, headers, time."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 64 * 1024
"""Bytes of a request's line and headers, beside those that come together with the first one."""
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
    """One connection: it is closed if its headers are too long, or too long on their way."""

    most = 1 << 20
    """Connections; those beyond are closed at once."""
    _head: int | None = 0
    """Bytes of headers so far; None while there are none to come."""
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
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > LONGEST_HEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:  # the first one is expected from the connection's beginning on
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self._too_late)

    def _end_head(self) -> None:
        self._head = None
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
