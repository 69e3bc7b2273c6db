"""Reads the requests of one connection, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from codedinvnet.net.http1 import (
    BadMessage,
    Block,
    Chunks,
    Fields,
    HeadReader,
    RequestHead,
    read_request,
)
from codedinvnet.net.memory import Account, Memory

SMALL = 1 << 12
"""Bytes of parts of a body that are joined to larger ones."""
FULL = "memory is full: try again later"
WEBSOCKETS = "WebSockets are not supported; behind a gateway, connect to the upstream directly"


def beginning(parts: Sequence[bytes], size: int) -> list[bytes]:
    """Return the first bytes of something in parts."""
    found: list[bytes] = []
    for part in parts:
        if size <= 0:
            break
        found.append(part[:size])
        size -= len(part)
    return found


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
        memory: counts the bytes of bodies.
        own: counts those of heads that are not complete.
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
        "_accepts", "_block", "_chunks", "_heads", "_left", "_most", "_most_body", "body", "head",
        "is_complete", "memory", "own", "size", "trailers",
    )  # fmt: skip

    def __init__(
        self,
        memory: Memory,
        own: Account,
        most_body: Callable[[RequestHead], int],
        accepts: Callable[[RequestHead, bool], bool],
    ) -> None:
        self.memory, self.own, self._most_body, self._accepts = memory, own, most_body, accepts
        self._block, self._heads = Block(), HeadReader(read_request)
        self.head: RequestHead | None = None
        self.body: list[bytes] = []
        self.trailers: Fields = []
        self.size = self._left = self._most = 0
        self._chunks: Chunks | None = None
        self.is_complete = False

    @property
    def is_in_head(self) -> bool:
        """Whether a part of a head is here, not only an empty line before it."""
        held = self._block.held
        return bool(held) and bool(held[:3].strip(b"\r\n"))

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request is here."""
        return self.head is None and not self.is_in_head

    def feed(self, data: bytes, at: int = 0) -> int:
        """Take in a request, or a part of it, and return the position behind that.

        Args:
            data: what came.
            at: where to begin.

        Raises:
            BadMessage: if it is malformed, or too large.
        """
        if self.head is None:
            at = self._read_head(data, at)
        if at < len(data) and self.head is not None and not self.is_complete:
            at = self._read_body(data, at)
        return at

    def drop(self) -> None:
        """Let go of what is held."""
        if self.size:
            self.memory.give(self.size)
        if held := self._block.held:
            self.own.give(len(held))
            held.clear()
        self.head, self.body, self.size = None, [], 0

    def take(self, came: float) -> Request:
        """Hand the complete request over; its body remains counted."""
        assert self.head is not None
        found = Request(self.head, self.body, self.trailers, self.size, came)
        self.body, self.size, self.is_complete = [], 0, False
        return found

    def _read_head(self, data: bytes, at: int) -> int:
        held = self._block.held
        before = len(held)
        try:
            block, at = self._block.take(data, at)
        finally:
            if len(held) != before:
                self.own.take(len(held) - before)
        if not block:
            return at
        head = self._heads.read(block)
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
        if has_body and b"expect" in known and not head.is_old:
            if known[b"expect"].lower() != b"100-continue":
                raise BadMessage("only Expect: 100-continue is supported", 417)
            waits = at == len(data)
        self.head, self.trailers = head, []
        if not self._accepts(head, waits):
            return len(data) if has_body else at
        if head.chunked:
            self._chunks = Chunks()
        elif head.length:
            self._chunks, self._left = None, head.length
        else:
            self.is_complete = True
        return at

    def _read_body(self, data: bytes, at: int) -> int:
        if self._chunks is None:
            piece = data[at : at + self._left]
            self._left -= len(piece)
            self._keep([piece])
            self.is_complete = not self._left
            return at + len(piece)
        pieces, at = self._chunks.feed(data, at)
        self._keep(pieces)
        if self._chunks.done:
            self.trailers, self.is_complete = self._chunks.trailers, True
        return at

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
