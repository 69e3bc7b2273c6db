"""Inference requests and answers that are passed on as they came, over HTTP or gRPC."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeAlias

from codedinvnet.models.upstream import Writes
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.background import in_thread
from codedinvnet.serving.faces.protobuf import fields
from codedinvnet.serving.faces.v2 import decompress
from codedinvnet.serving.service import Request

Transport: TypeAlias = Literal["http", "grpc"]
Headers: TypeAlias = tuple[tuple[str, str], ...]

LARGEST = 1 << 30
"""Bytes that an upstream's answer may have, and that a compressed body may become."""
STOPPED = "stopped"
"""The result of a call whose answer nobody needs."""
ANSWERED, OVER = "answered", "over"
"""How a wait for an upstream ends as well; otherwise why the upstream is lost."""
MOST_BREAKS = 2
"""Connections that may break over a request: what kills two servers is sent to no third."""
MOST_FIELDS = 4096
"""Fields of a message that are looked at for the model's name."""
OK = {"http": 200, "grpc": 0}
"""The status of success."""
ABSENT = {"http": 404, "grpc": 5}
"""The status of a server that has no such model, or no such version of it."""
BLAMED_HTTP = frozenset({408, 429})
"""HTTP statuses of 400 to 499 that tell of the upstream and not of the request."""
UNIMPLEMENTED = 501
"""The HTTP status above that tells of the request: Triton answers so for decoupled models."""
OWN_GRPC = frozenset({3, 5, 6, 7, 9, 11, 12, 16})
"""gRPC statuses that tell of the request: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS,
PERMISSION_DENIED, FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED."""
EXHAUSTED = 8
"""The gRPC status of an overload, and of a message that is too large."""
OF_ANSWERS = rf" \(\d+ vs\. {LARGEST}\)"
TOO_LARGE = re.compile(
    rf"(?<!CLIENT: )received message larger than max(?!{OF_ANSWERS})|exceeds maximum size",
    re.IGNORECASE,
)
"""How servers say that a request is too large for them; of an answer this client says it itself."""
HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
        "transfer-encoding", "upgrade", "host", "content-length", "expect", "date", "server",
    }
)  # fmt: skip
"""Headers that are of one connection, and are not passed on."""


class Unreachable(Exception):
    """The upstream did not answer: it refused, hung up or was silent.

    Args:
        reason: what is known of it.
        reply: the upstream's answer after all, if it says that it is ready.
        sent: whether the request had been sent, so that the upstream may have been at it.
    """

    def __init__(self, reason: str, reply: Reply | None = None, sent: bool = False) -> None:
        super().__init__(reason)
        self.reply, self.sent = reply, sent


class NoFiles(Unreachable):
    """This process may open no more files: what the upstream would say, nobody knows."""

    told = "this process may open no more files (ulimit -n)"

    def __init__(self) -> None:
        super().__init__(self.told)


class NotProtocol(Exception):
    """The upstream answered what is not the protocol, or does not have the model."""


def lacks_files(error: OSError | None = None) -> bool:
    """Tell whether this process may open no more files, now or by what an error says."""
    if error is None:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as refused:
            error = refused
    return error is not None and error.errno in (errno.EMFILE, errno.ENFILE)


class Fate:
    """How a wait for an upstream's answer ends.

    Attributes:
        how: what ended it first; "" while it goes on.
    """

    def __init__(self) -> None:
        self.how = ""
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, how: str) -> None:
        """End the wait, if nothing has."""
        self.how = self.how or how
        self.look()

    def look(self) -> None:
        """Let whoever waits look at something else meanwhile."""
        if not self._turn.done():
            self._turn.set_result(None)

    async def turn(self) -> None:
        """Return when the wait ends, or there is something to look at."""
        if not self.how:
            await self._turn
            self._turn = asyncio.get_running_loop().create_future()


@dataclass
class Call:
    """A client's inference request.

    Attributes:
        model: the name that the client asks for.
        version: of the model; "" if the client leaves it to the server.
        transport: how the request came.
        body: the HTTP body, or the serialized ModelInferRequest.
        headers: HTTP headers or gRPC metadata that are passed on.
        deadline: when nobody waits any longer, of the monotonic clock.
        request: what was read of it; None if nobody has, or could.
        refusal: the last answer by which an upstream failed, if there was one.
        backed: seconds until a small backup is asked about it, once it is lost; None: none is.
        is_lost: whether it is left to the backup, since an upstream failed it.
        running: waits for upstreams that can be told to stop.
        is_over: whether nobody needs another answer.
        has_hung: whether it was sent to another upstream because one did not answer in time.
        breaks: how many connections broke while an upstream may have been at it.
        waits: how many upstreams are at it.
        most: bytes that the body may have unpacked.
        plain: the body unpacked, or why that cannot be; None if nobody has tried.
        in_json: writes a question of the gateway's own without binary tensors, which some upstreams
            do not take over HTTP; None: a client's request, which is passed on as it is.
        url_query: what follows the path in the client's URL; upstreams over gRPC have none.
    """

    model: str
    version: str
    transport: Transport
    body: bytes
    headers: Headers
    deadline: float
    request: Request | None = None
    refusal: Reply | None = None
    backed: float | None = None
    is_lost: bool = False
    running: set[Fate] = field(default_factory=set)
    is_over: bool = False
    has_hung: bool = False
    breaks: int = 0
    waits: int = 0
    most: int = LARGEST
    plain: bytes | BadRequest | None = None
    in_json: Writes | None = None
    url_query: str = ""

    @property
    def is_suspect(self) -> bool:
        """Whether no other upstream is to get it: it may be what connections break by."""
        return self.breaks >= MOST_BREAKS or (self.breaks > 0 and self.waits > 0)

    @property
    def encoding(self) -> str | None:
        """The Content-Encoding of an HTTP body; None if it is not packed."""
        found = dict(self.headers).get("content-encoding", "identity")
        return None if self.transport == "grpc" or found.lower() == "identity" else found

    @property
    def size(self) -> int:
        """How many bytes it holds: as it came, unpacked, and as tensors."""
        plain = len(self.plain) if isinstance(self.plain, bytes) else 0
        return len(self.body) + plain + (0 if self.request is None else self.request.size)

    async def unpacked(self) -> bytes:
        """Return the body without its Content-Encoding, which is undone once, in a thread.

        Raises:
            BadRequest: if the encoding is unknown, or the body is damaged.
            TooLarge: if it has more than `most` bytes.
        """
        if self.encoding is None:
            return self.body
        if self.plain is None:
            try:
                body, encoding, most = self.body, self.encoding, self.most
                self.plain = await in_thread(lambda: decompress(body, encoding, most))
            except BadRequest as error:
                self.plain = error
        if isinstance(self.plain, BadRequest):
            raise self.plain
        return self.plain

    def finish(self) -> None:
        """Tell upstreams that are still at it to stop: nobody needs another answer."""
        self.is_over = True
        for fate in self.running:
            fate.end(STOPPED)


@dataclass(frozen=True)
class Reply:
    """An upstream's answer.

    Attributes:
        transport: how it is to be read.
        status: the HTTP status, or the gRPC code.
        body: the HTTP body, or the serialized ModelInferResponse.
        headers: HTTP headers to pass on; over gRPC the outcome alone, if the upstream tells one.
        message: what a gRPC error says.
    """

    transport: Transport
    status: int
    body: bytes = b""
    headers: Headers = ()
    message: str = ""

    @property
    def fails(self) -> bool:
        """Whether the upstream failed; otherwise this is its answer, maybe an error of its own."""
        if self.transport == "http":
            is_own = self.status < 300 or 400 <= self.status < 500 or self.status == UNIMPLEMENTED
            return not is_own or self.status in BLAMED_HTTP
        is_own = self.status in OWN_GRPC or self.asks_too_much
        return self.status != OK["grpc"] and not is_own

    @property
    def asks_too_much(self) -> bool:
        """Whether the request is larger than a server over gRPC takes."""
        is_exhausted = self.transport == "grpc" and self.status == EXHAUSTED
        return is_exhausted and TOO_LARGE.search(self.message) is not None

    @property
    def is_ok(self) -> bool:
        """Whether it is a success."""
        return self.status == OK[self.transport]

    def __str__(self) -> str:
        said = self.message or self.body[:200].decode(errors="replace")
        return f"{self.transport} status {self.status}: {said}".rstrip(": ")


def problem(status: int, message: str) -> Reply:
    """Return an error as the protocol has it over HTTP."""
    body = json.dumps({"error": message}).encode()
    return Reply("http", status, body, (("content-type", "application/json"),))


def passed_on(headers: Headers) -> Headers:
    """Return the headers without those that are of one connection, in lower case."""
    dropped, named = HOP_BY_HOP, [value for name, value in headers if name == "connection"]
    if named:
        dropped = dropped.union(name.strip() for name in ",".join(named).lower().split(","))
    return tuple((name, value) for name, value in headers if name not in dropped)


def model_of(message: bytes) -> tuple[str, str]:
    """Return the model's name and version of a serialized ModelInferRequest.

    Only the first fields are read: the tensors behind them stay unparsed. Both are "" if they are
    not among these.

    Raises:
        ValueError: if that is no such message.
    """
    found = {1: b"", 2: b""}
    for number, begin, end in islice(fields(message), MOST_FIELDS):
        if number > 4 and found[1]:  # every implementation writes fields in their order
            break
        if number in found:
            found[number] = message[begin:end]
    return found[1].decode(), found[2].decode()
