"""Writes answers to one client: the server's own, and upstreams', byte for byte."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from codedinvnet.net.http1 import HOP_BY_HOP, Field, Fields, ResponseHead, write_fields

if TYPE_CHECKING:
    from codedinvnet.net.server import ClientConnection

HIGH, LOW = 1 << 18, 0
"""Bytes that wait for a client at which an upstream is no longer read, and is again."""
REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}

NO_LENGTH = HOP_BY_HOP | {b"content-length"}


class Reply(NamedTuple):
    """An answer of the server's own."""

    status: int
    body: bytes
    kind: str = "application/json"
    fields: Sequence[Field] = ()
    """Others than those that describe the body."""


def error_reply(status: int, reason: str, *fields: Field) -> Reply:
    """Return an error, with its reason in words."""
    return Reply(status, json.dumps({"error": reason}).encode(), fields=fields)


@lru_cache(1)
def http_date(second: int) -> bytes:
    """Return a time as the field Date has it."""
    return formatdate(second, usegmt=True).encode()


class Answers:
    """Writes to a client's connection.

    Args:
        connection: the client's.

    Attributes:
        waiting: bytes that wait for the client, as they were counted last.
        progress: when the client last took a byte.
        is_begun: whether a part of an answer was written, and the rest is to come.
        is_paused: whether the client is slow, and nothing more should be written for now.
    """

    __slots__ = (
        "_connection", "_held", "_is_chunking", "_keeps", "_write_left", "is_begun", "is_paused",
        "memory", "peer", "progress", "waiting",
    )  # fmt: skip

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self.memory = connection, connection.server.memory
        self._is_chunking = self._keeps = self.is_paused = self.is_begun = False
        self._write_left: int | None = None
        """Bytes of an answer with a length that are to come."""
        self.waiting = 0
        self._held = 0
        """Bytes since nothing waited: uvloop keeps what was written at once until all is sent."""
        self.progress = time.monotonic()
        self.peer = ("unknown", False)
        """The client's address, and whether its connection is of TLS."""

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
        request = self._connection.reader.head
        assert request is not None
        # HTTP allows no length at 204, and clients differ in what they make of it.
        fields = head.written(NO_LENGTH) if head.status == 204 else head.written()
        if head.length is None and is_complete and not trailers and head.has_body(request.method):
            fields += b"Content-Length: %d\r\n" % sum(map(len, body))
        if added:
            fields += write_fields(added)
        self._write_left = None
        is_kept = self._connection.is_kept()
        start = b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)
        parts = [start, fields]
        open_ended = head.length is None and head.has_body(request.method)
        self._is_chunking = open_ended and (not is_complete or bool(trailers))
        if self._is_chunking and request.is_old:
            self._is_chunking = is_kept = False
        if self._is_chunking:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        self._keeps = is_kept
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
            self._connection.done(is_kept)
            return
        self.is_begun = True
        if head.length is not None:
            self._write_left = head.length - sum(map(len, body))
        if self.is_paused and self._connection.call is not None:
            self._connection.call.pause()

    def send_body(self, data: bytes) -> None:
        """Send the next part of an answer's body."""
        self._write([chunk(data) if self._is_chunking else data])

    def end_body(self, trailers: Fields) -> None:
        """The answer's body is complete."""
        if self._is_chunking:
            self._write([b"0\r\n" + write_fields(trailers) + b"\r\n"])
        self._is_chunking = self.is_begun = False
        self._connection.done(self._keeps)

    def abort(self, last: bytes = b"") -> None:
        """Close at once, so that the client sees that its answer is not complete.

        Args:
            last: what it gets before, if its answer has no length.
        """
        if last and self._is_chunking:
            self._write([chunk(last)])
            self._connection.close()
            return
        transport = self._connection.transport
        if not self._is_chunking and not self._write_left and not transport.is_closing():
            # The end of the connection would be that of the body.
            own = transport.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.abort()

    @property
    def is_asked(self) -> bool:
        """Whether a whole request waits for its answer."""
        return self._connection.is_answering

    def reply(self, reply: Reply, closes: bool = False) -> None:
        """Give an answer of the server's own, which may end the connection."""
        connection = self._connection
        request, status, body = connection.reader.head, reply.status, reply.body
        is_kept = not closes and connection.is_kept()
        more = write_fields(reply.fields) if reply.fields else b""
        if status == 401:
            more += b"WWW-Authenticate: Bearer\r\n"
        if not is_kept:
            more += b"Connection: close\r\n"
        elif request is not None and request.is_old:
            more += b"Connection: keep-alive\r\n"
        head = (
            b"HTTP/1.1 %d %b\r\nDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n"
        ) % (
            status,
            REASONS[status],
            http_date(int(time.time())),
            reply.kind.encode(),
            len(body),
            more,
        )
        is_head = request is not None and request.method == b"HEAD"
        if is_head or not body:
            self._write([head])
        else:
            self._write([head, body] if len(body) > HIGH else [head + body])
        connection.server.handler.replied(request, status, self)
        connection.done(is_kept)

    def refuse(self, status: int, reason: str, retry_after: int = 0, closes: bool = False) -> None:
        """Answer with an error.

        Args:
            status: of it.
            reason: in words.
            retry_after: seconds after which the client may try again; 0 if unknown.
            closes: whether the connection ends by it.
        """
        again = ((b"Retry-After", b" %d" % retry_after),) if retry_after else ()
        self.reply(error_reply(status, reason, *again), closes)

    def _write(self, data: Sequence[bytes]) -> None:
        transport = self._connection.transport
        if transport.is_closing():
            return
        if self.waiting and not transport.get_write_buffer_size():
            self.count(0)
        if len(data) == 1:
            transport.write(data[0])
        else:
            transport.writelines(data)
        if (waiting := transport.get_write_buffer_size()) or self.waiting:
            size = sum(map(len, data))
            self._connection.account.take(size)
            self._held += size
            self.count(waiting)
            if self.memory.is_full and not self.is_paused:
                transport.set_write_buffer_limits(0, 0)

    def count(self, waiting: int) -> None:
        """Count what waits for the client."""
        if waiting == self.waiting:
            return
        if not self.waiting:
            self.progress = time.monotonic()
        self.waiting = waiting
        if not waiting:
            self._connection.account.give(self._held)
            self._held = 0

    def pause(self) -> None:
        """The client is slow: have its upstream read no further."""
        self.is_paused = True
        if (call := self._connection.call) is not None:
            call.pause()

    def resume(self) -> None:
        """The client has taken what waited for it."""
        self.is_paused, self.progress = False, time.monotonic()
        transport = self._connection.transport
        self.count(transport.get_write_buffer_size())
        transport.set_write_buffer_limits(HIGH, LOW)
        if (call := self._connection.call) is not None:
            call.resume()


def chunk(data: bytes) -> bytes:
    """Return a part of a body as a chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)
