"""HTTP/1.1 messages, read strictly: heads by regular expressions, and bodies in chunks.

Whatever two readers could understand differently is refused: a bare LF or CR, folded fields, a
space before a colon, two lengths, a length and chunks, and any other transfer coding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import unquote

MOST_HEAD = 1 << 16
"""Bytes of a start line with its fields, or of trailers."""
MOST_SIZE_LINE = 1 << 10
"""Bytes of the line before a chunk, extensions included."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]*"
_REQUEST = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\r\n")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: (" + _TEXT + rb"))?\r\n")
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":" + _TEXT + rb"\r\n)*\r\n")
_FIELD = re.compile(rb"([^:\r]+):([^\r]*)\r\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
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
    """What precedes a body.

    Attributes:
        fields: as they came.
        known: name in lower case -> value without blanks; several are joined by commas.
        keeps: whether the connection may be used for another message.
        chunked: whether the body comes in chunks.
        length: the body's length; None if no field says it.
        is_old: whether it is of HTTP/1.0, which has no chunks.
    """

    __slots__ = ("chunked", "fields", "is_old", "keeps", "known", "length")

    def __init__(self, fields: Fields, minor: bytes) -> None:
        known: dict[bytes, bytes] = {}
        for name, value in fields:
            name, value = name.lower(), value.strip(b" \t")
            known[name] = known[name] + b"," + value if name in known else value
        self.fields, self.known, self.is_old = fields, known, minor == b"0"
        said = known.get(b"connection")
        options = () if said is None else {one.strip(b" \t") for one in said.lower().split(b",")}
        self.keeps = b"close" not in options if minor == b"1" else b"keep-alive" in options
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

    def end_to_end(self, *dropped: bytes) -> Fields:
        """Return the fields that a proxy passes on.

        Args:
            dropped: other names to leave out, in lower case.
        """
        known = self.known
        if HOP_BY_HOP.isdisjoint(known) and not any(name in known for name in dropped):
            return self.fields
        left_out = {*HOP_BY_HOP, *dropped}
        named = known.get(b"connection", b"").lower()
        left_out.update(name.strip(b" \t") for name in named.split(b","))
        return [field for field in self.fields if field[0].lower() not in left_out]


class RequestHead(Head):
    """The head of a request."""

    __slots__ = ("_path", "method", "target")

    def __init__(self, method: bytes, target: bytes, fields: Fields, minor: bytes) -> None:
        super().__init__(fields, minor)
        self.method, self.target, self._path = method, target, ""
        host = self.known.get(b"host")
        if b"," in host if host is not None else minor == b"1":  # several were joined
            raise BadMessage("a request needs one Host field")

    @property
    def path(self) -> str:
        """The target without its query, decoded."""
        if not self._path:
            path = self.target.partition(b"?")[0].decode("latin-1")
            self._path = unquote(path) if "%" in path else path
        return self._path

    def to_origin_form(self) -> None:
        """Leave the host out of a target that has one, as clients of proxies send it.

        Raises:
            BadMessage: if it is no path then.
        """
        if self.target.startswith(b"/") or (self.target == b"*" and self.method == b"OPTIONS"):
            return
        if not self.target[:8].lower().startswith((b"http://", b"https://")):
            raise BadMessage("the target must begin with /")
        self.target = b"/" + self.target.partition(b"://")[2].partition(b"/")[2]


class ResponseHead(Head):
    """The head of an answer."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: bytes, fields: Fields, minor: bytes) -> None:
        super().__init__(fields, minor)
        self.status, self.reason = status, reason

    def has_body(self, method: bytes) -> bool:
        """Tell whether an answer to a method may have a body."""
        return method != b"HEAD" and self.status >= 200 and self.status not in (204, 304)


def read_fields(block: bytes) -> Fields:
    """Return the fields in a block that ends with an empty line.

    Raises:
        BadMessage: if it is none.
    """
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


def write_fields(fields: Iterable[Field]) -> bytes:
    """Return fields as they are sent, without the empty line behind them."""
    return b"".join([b"%b:%b\r\n" % field for field in fields])


class Chunks:
    """Takes a body in chunks apart.

    Attributes:
        done: whether its end is here.
        trailers: the fields behind it.
        rest: what follows its end.
    """

    __slots__ = ("_held", "_left", "_part", "done", "rest", "trailers")

    def __init__(self) -> None:
        self._part, self._left, self._held = "size", 0, b""
        self.done, self.rest = False, b""
        self.trailers: Fields = []

    def feed(self, data: bytes) -> list[bytes]:
        """Take what came, and return the parts of the body in it.

        Raises:
            BadMessage: if it is no such body.
        """
        if self._held:
            data, self._held = self._held + data, b""
        found: list[bytes] = []
        at, size = 0, len(data)
        while at < size:
            if self._part == "data":
                piece = data[at : at + self._left]
                found.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._part = "end"
            elif self._part == "end":
                if size - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise BadMessage("a chunk is longer than its size")
                at += 2
                self._part = "size"
            elif self._part == "size":
                line = _SIZE.match(data, at)
                if line is None:
                    if data.find(b"\n", at) >= 0 or size - at > MOST_SIZE_LINE:
                        raise BadMessage("the size of a chunk is malformed")
                    break
                at = line.end()
                self._left = int(line.group(1), 16)
                self._part = "data" if self._left else "trailers"
            else:
                at = self._end(data, at)
                if at < 0:
                    return found
                self.done, self.rest = True, data[at:]
                return found
        self._held = data[at:]
        return found

    def _end(self, data: bytes, at: int) -> int:
        """Return where the trailers end; -1 if that is not here."""
        if data.startswith(b"\r\n", at):
            return at + 2
        end = data.find(END, at)
        if end < 0:
            if len(data) - at > MOST_HEAD:
                raise BadMessage("the trailers are too long", 431)
            self._held = data[at:]
            return -1
        self.trailers = read_fields(data[at : end + 4])
        return end + 4
