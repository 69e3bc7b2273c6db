"""HTTP/1.1 messages, read strictly: heads by regular expressions, and bodies in chunks.

Whatever two readers could understand differently is refused: a bare LF or CR, folded fields, a
space before a colon, two lengths, a length and chunks, and any other transfer coding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Generic, TypeAlias, TypeVar
from urllib.parse import unquote

MOST_HEAD = 1 << 16
"""Bytes of a start line with its fields, or of trailers."""
MOST_FIELDS = 100
"""Fields of a head, or of trailers: as many as Apache and Envoy take."""
MOST_SIZE_LINE = 1 << 10
"""Bytes of the line before a chunk, extensions included."""
LONGEST_REMEMBERED = 1 << 10
"""Bytes of the longest head that a connection remembers; most have fewer."""
MOST_CHUNKS = 1000
"""Chunks that are read in one turn, which takes about 1 ms: a byte may be a chunk."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_REQUEST = re.compile(rb"(?:\r\n)?(" + _TOKEN + rb") ([\x21\x22\x24-\x7e]+) HTTP/1\.([01])\r\n")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: (" + _TEXT + rb"))?\r\n")
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":" + _TEXT + rb"\r\n)*\r\n")
_FIELD = re.compile(rb"([^:\r]+):([^\r]*)\r\n")
_HOST = re.compile(rb"(?:(?:[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]+)(.*)")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;" + _TEXT + rb")?\r\n")

Field: TypeAlias = tuple[bytes, bytes]
Fields: TypeAlias = list[Field]
"""Names and values as they came; a value keeps the blanks around it."""

HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authorization", b"proxy-connection", b"te",
        b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
"""Fields of one connection, which a proxy does not pass on."""
NO_TRAILERS = HOP_BY_HOP | {
    b"accept-encoding", b"age", b"authorization", b"cache-control", b"content-encoding",
    b"content-length", b"content-range", b"content-type", b"cookie", b"date", b"expect", b"expires",
    b"forwarded", b"host", b"location", b"max-forwards", b"proxy-authenticate", b"retry-after",
    b"set-cookie", b"trailer", b"vary", b"warning", b"www-authenticate", b"x-forwarded-for",
    b"x-forwarded-host", b"x-forwarded-proto", b"x-hedge", b"x-priority", b"x-request-id",
}  # fmt: skip
"""Fields that mean nothing behind a body, though a lenient server may join them to the header: they
frame, route, authorize or describe a message (RFC 9110, 6.5.1). They are dropped."""
END = b"\r\n\r\n"
"""The end of a head."""


class BadMessage(Exception):
    """A message that HTTP/1.1 does not allow, or that is too large.

    Args:
        reason: what is wrong with it.
        status: what a server answers.
    """

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class Head:
    """What precedes a body; messages whose heads are the same share one, so nobody changes it.

    Attributes:
        fields: as they came.
        known: name in lower case -> value without blanks; several are joined by commas.
        keeps: whether the connection may be used for another message.
        chunked: whether the body comes in chunks.
        length: the body's length; None if no field says it.
        is_old: whether it is of HTTP/1.0, which has no chunks.
    """

    __slots__ = ("_written", "chunked", "fields", "is_old", "keeps", "known", "length")

    def __init__(self, fields: Fields, minor: bytes) -> None:
        known: dict[bytes, bytes] = {}
        self._written: dict[frozenset[bytes], bytes] = {}
        for name, value in fields:
            name, value = name.lower(), value.strip()
            known[name] = known[name] + b"," + value if name in known else value
        self.fields, self.known, self.is_old = fields, known, minor == b"0"
        said = known.get(b"connection", b"").lower()
        option = b"keep-alive" if self.is_old else b"close"
        is_said = option in said and option in map(bytes.strip, said.split(b","))
        self.keeps = is_said == self.is_old
        coding, length = known.get(b"transfer-encoding"), known.get(b"content-length")
        self.chunked, self.length = coding is not None, None
        if coding is not None:
            if length is not None or minor == b"0":
                raise BadMessage("Transfer-Encoding with Content-Length, or in HTTP/1.0")
            if coding.lower() != b"chunked":
                raise BadMessage("Transfer-Encoding: only 'chunked' is supported", 501)
        elif length is not None:
            if _LENGTH.fullmatch(length) is None:
                raise BadMessage("Content-Length must be one number")
            self.length = int(length)

    def end_to_end(self, dropped: frozenset[bytes] = HOP_BY_HOP) -> Fields:
        """Return the fields that a proxy passes on.

        Args:
            dropped: names to leave out, in lower case: `HOP_BY_HOP`, and perhaps others.
        """
        known = self.known
        if dropped.isdisjoint(known):
            return self.fields
        if b"connection" in known:
            named = known[b"connection"].lower().split(b",")
            also = frozenset(map(bytes.strip, named)) - {b"content-length"}  # the body's end
            dropped = dropped | also
        return [field for field in self.fields if field[0].lower() not in dropped]

    def written(self, dropped: frozenset[bytes] = HOP_BY_HOP) -> bytes:
        """Return the fields that a proxy passes on as they are sent, see `end_to_end`."""
        found = self._written.get(dropped)
        if found is None:
            found = self._written[dropped] = write_fields(self.end_to_end(dropped))
        return found


class RequestHead(Head):
    """The head of a request."""

    __slots__ = ("_path", "method", "target")

    def __init__(self, method: bytes, target: bytes, fields: Fields, minor: bytes) -> None:
        super().__init__(fields, minor)
        self.method, self.target, self._path = method, target, ""
        host = self.known.get(b"host")
        if minor == b"1" if host is None else _HOST.fullmatch(host) is None:
            raise BadMessage("a request needs one Host field, with a name or an address")

    @property
    def path(self) -> str:
        """The target without its query, decoded."""
        if not self._path:
            path = self.target.partition(b"?")[0].decode("latin-1")
            self._path = unquote(path) if "%" in path else path
        return self._path

    def to_origin_form(self) -> None:
        """Leave the host out of a target that has one, as clients of proxies send it.

        That host then takes the place of the field's.

        Raises:
            BadMessage: if it is no path then.
        """
        if self.target.startswith(b"/") or (self.target == b"*" and self.method == b"OPTIONS"):
            return
        found = _ABSOLUTE.fullmatch(self.target)
        if found is None or _HOST.fullmatch(found[1]) is None:
            raise BadMessage("the target must begin with /")
        self.known[b"host"], target = found.groups()
        if not target and self.method == b"OPTIONS":
            self.target = b"*"
        else:
            self.target = target if target.startswith(b"/") else b"/" + target


class ResponseHead(Head):
    """The head of an answer."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: bytes, fields: Fields, minor: bytes) -> None:
        super().__init__(fields, minor)
        self.status, self.reason = status, reason

    def has_body(self, method: bytes) -> bool:
        """Return whether an answer to a method may have a body."""
        return method != b"HEAD" and self.status >= 200 and self.status not in (204, 304)


def read_fields(block: bytes) -> Fields:
    """Return the fields in a block that ends with an empty line.

    Raises:
        BadMessage: if it is none.
    """
    if block.count(b"\n") > MOST_FIELDS + 1:
        raise BadMessage(f"there are more than {MOST_FIELDS} header fields", 431)
    if _FIELDS.fullmatch(block) is None:
        raise BadMessage("a header field is malformed")
    return _FIELD.findall(block)


def read_request(data: bytes) -> RequestHead:
    """Return the head of a request, which is all of the data.

    Raises:
        BadMessage: if it is none.
    """
    found = _REQUEST.match(data)
    if found is None:
        raise BadMessage("the request line is malformed")
    method, target, minor = found.groups()
    return RequestHead(method, target, read_fields(data[found.end() :]), minor)


def read_response(data: bytes) -> ResponseHead:
    """Return the head of an answer, which is all of the data.

    Raises:
        BadMessage: if it is none.
    """
    found = _STATUS.match(data)
    if found is None:
        raise BadMessage("the status line is malformed")
    minor, status, reason = found.groups()
    return ResponseHead(int(status), reason or b"", read_fields(data[found.end() :]), minor)


AnyHead = TypeVar("AnyHead", bound=Head)


class HeadReader(Generic[AnyHead]):
    """Reads the heads of one connection. Where one is the same as the last, it is not read again.

    Args:
        read: `read_request` or `read_response`.
    """

    __slots__ = ("_data", "_head", "_read")

    def __init__(self, read: Callable[[bytes], AnyHead]) -> None:
        self._read, self._data = read, b""
        self._head: AnyHead | None = None

    def read(self, data: bytes) -> AnyHead:
        """Return the head that is all of the data.

        Raises:
            BadMessage: if it is none.
        """
        head = self._head
        if head is None or data != self._data:
            head = self._read(data)
            if len(data) <= LONGEST_REMEMBERED:
                self._data, self._head = data, head
        return head


def write_fields(fields: Iterable[Field]) -> bytes:
    """Return fields as they are sent, without the empty line behind them."""
    return b"".join([b"%b:%b\r\n" % field for field in fields])


class Block:
    """Collects a head, or trailers, up to the empty line; no byte is searched twice."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = bytearray()
        """Its beginning, if the rest is to come."""

    def take(self, data: bytes, at: int) -> tuple[bytes, int]:
        """Return the block with its empty line, and the position behind it.

        Args:
            data: what came.
            at: where the block begins in it, or goes on.

        Returns:
            b"" and the end of the data if the rest is to come.

        Raises:
            BadMessage: if it is too long, or a line ends with a bare LF.
        """
        held = self.held
        if not held:
            end = data.find(END, at, at + MOST_HEAD)
            if end >= 0:
                end += len(END)
                return data[at:end], end
        seen = len(held)
        held += data[at : at + MOST_HEAD - seen]
        end = held.find(END, max(0, seen - len(END) + 1))
        if end >= 0:
            end += len(END)
            block = bytes(held[:end])
            held.clear()
            return block, at + end - seen
        if len(held) == MOST_HEAD:
            raise BadMessage(f"the header fields take more than {MOST_HEAD} bytes", 431)
        if _BARE_LF.search(held, seen):
            raise BadMessage("a line ends with a bare LF")
        return b"", len(data)


class Chunks:
    """Takes a body in chunks apart.

    Attributes:
        done: whether its end is here.
        trailers: the fields behind it.
    """

    __slots__ = ("_block", "_held", "_left", "_part", "done", "trailers")

    def __init__(self) -> None:
        self._part, self._left, self._held = "size", 0, b""
        """What comes next; bytes of a chunk that are to come; the beginning of a line."""
        self._block = Block()
        self.done = False
        self.trailers: Fields = []

    def feed(self, data: bytes, at: int = 0) -> tuple[list[bytes], int]:
        """Return the parts of the body in the data, and the position behind them.

        That is before the end of the data if the body ends there, or after MOST_CHUNKS.

        Args:
            data: what came.
            at: where to begin.

        Raises:
            BadMessage: if it is no such body.
        """
        joined = len(self._held)
        if joined:
            data, at, joined, self._held = self._held + data[at:], 0, joined - at, b""
        found: list[bytes] = []
        size, left = len(data), MOST_CHUNKS
        while at < size and left and not self.done:
            if self._part == "data":
                piece = data[at : at + self._left]
                found.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._part = "end"
                    left -= 1
            elif self._part == "end":
                if size - at < 2:
                    self._held, at = data[at:], size
                elif data.startswith(b"\r\n", at):
                    at += 2
                    self._part = "size"
                else:
                    raise BadMessage("a chunk is longer than its size")
            elif self._part == "size":
                line = _SIZE.match(data, at)
                if line is not None:
                    at = line.end()
                    self._left = int(line.group(1), 16)
                    self._part = "data"
                    if not self._left:
                        self._part = "trailers"
                        at -= 2  # without trailers, this line's end and an empty line are left
                elif data.find(b"\n", at) >= 0 or size - at > MOST_SIZE_LINE:
                    raise BadMessage("the size of a chunk is malformed")
                else:
                    self._held, at = data[at:], size
            else:
                block, at = self._block.take(data, at)
                if block:
                    self.done, fields = True, read_fields(block[2:])
                    self.trailers = [one for one in fields if one[0].lower() not in NO_TRAILERS]
        return found, at - joined
