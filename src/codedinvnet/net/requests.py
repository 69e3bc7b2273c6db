"""Reads the requests of one connection, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from codedinvnet.net.http1 import (
    END,
    MOST_HEAD,
    BadMessage,
    Chunks,
    Fields,
    RequestHead,
    read_request,
)
from codedinvnet.net.memory import Memory

SMALL = 1 << 12
"""Bytes of parts of a body that are joined to larger ones."""
FULL = "memory is full: try again later"
WEBSOCKETS = "WebSockets are not supported; behind a gateway, connect to the upstream directly"


class Request(NamedTuple):
    """A complete request."""

    head: RequestHead
    body: list[bytes]
    trailers: Fields
    size: int
    """Bytes of the body, which are counted as held until the handler gives them back."""
    came: float
    """When its first byte came (`time.monotonic()`)."""


class RequestReader:
    """Reads one request after the other.

    Args:
        memory: counts the bytes that it holds.
        most_body: returns how many bytes a request's body may have.
        accepts: called with a head, and whether the client waits for 100 Continue; returns whether
            the request is to be read on, or was answered already.

    Attributes:
        head: of the request that is being read; None before it is here.
        body: its parts that are here.
        size: bytes of the body.
        trailers: behind the body.
        is_complete: whether all of the request is here.
    """

    __slots__ = (
        "_accepts", "_chunks", "_held", "_left", "_most", "_most_body", "body", "head",
        "is_complete", "memory", "size", "trailers",
    )  # fmt: skip

    def __init__(
        self,
        memory: Memory,
        most_body: Callable[[RequestHead], int],
        accepts: Callable[[RequestHead, bool], bool],
    ) -> None:
        self.memory, self._most_body, self._accepts = memory, most_body, accepts
        self._held = b""
        """The beginning of a head."""
        self.head: RequestHead | None = None
        self.body: list[bytes] = []
        self.trailers: Fields = []
        self.size = self._left = self._most = 0
        self._chunks: Chunks | None = None
        self.is_complete = False

    @property
    def is_in_head(self) -> bool:
        """Whether a part of a head is here."""
        return bool(self._held)

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request is here."""
        return self.head is None and not self._held

    def feed(self, data: bytes) -> bytes:
        """Take a part of a request in, and return what follows it.

        Raises:
            BadMessage: if it is malformed, or too large.
        """
        return self._read_head(data) if self.head is None else self._read_body(data)

    def drop(self) -> None:
        """Let go of what is held."""
        self.memory.give(self.size + len(self._held))
        self._held, self.head, self.body, self.size = b"", None, [], 0

    def take(self, came: float) -> Request:
        """Hand the complete request over; its body remains counted."""
        assert self.head is not None
        found = Request(self.head, self.body, self.trailers, self.size, came)
        self.body, self.size, self.is_complete = [], 0, False
        return found

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
        head = read_request(data[:end])
        known = head.known
        if head.method == b"CONNECT" or b"websocket" in known.get(b"upgrade", b"").lower():
            self.head = head
            raise BadMessage(WEBSOCKETS, 501)
        head.to_origin_form()
        has_body = head.chunked or bool(head.length)
        self._most = self._most_body(head)
        if (head.length or 0) > self._most:
            self.head = head
            raise BadMessage(f"body: more than {self._most} bytes", 413)
        if has_body and self.memory.is_full:
            self.head = head
            raise BadMessage(FULL, 503)
        waits = False
        if has_body and b"expect" in known:
            if known[b"expect"].lower() != b"100-continue":
                raise BadMessage("only Expect: 100-continue is supported", 417)
            waits = len(data) == end
        self.head, self.trailers = head, []
        if not self._accepts(head, waits):
            return b"" if has_body else data[end:]
        if head.chunked:
            self._chunks = Chunks()
        elif head.length:
            self._chunks, self._left = None, head.length
        else:
            self.is_complete = True
        return data[end:]

    def _read_body(self, data: bytes) -> bytes:
        if self._chunks is None:
            piece, rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            self._keep([piece])
            if not self._left:
                self.is_complete = True
            return rest
        chunks = self._chunks
        self._keep(chunks.feed(data))
        if not chunks.done:
            return b""
        self.trailers, self.is_complete = chunks.trailers, True
        return chunks.rest

    def _keep(self, pieces: list[bytes]) -> None:
        """Take parts of the body in; small ones become one, since each costs memory of its own."""
        body, size = self.body, sum(map(len, pieces))
        if body and len(body[-1]) < SMALL and size < SMALL:
            pieces = [body.pop(), *pieces]
        body += pieces if len(pieces) == 1 else [b"".join(pieces)]
        self.size += size
        self.memory.take(size)
        if self.size > self._most:
            raise BadMessage(f"body: more than {self._most} bytes", 413)
        if size and self.memory.is_full_for(self.size):
            raise BadMessage(FULL, 503)
