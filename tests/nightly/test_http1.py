"""Requests that others wrote, or that chance did, beside other readers: `make nightly`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import h11
import pytest
import uvloop

from codedinvnet.net.answers import Answers
from codedinvnet.net.client import Broken, HttpClient, parse_origin
from codedinvnet.net.requests import Request
from tests.net.test_server import Echo, serving

pytestmark = pytest.mark.nightly
MUTATIONS = 5000
LLHTTP = json.loads(Path(__file__).with_name("llhttp.json").read_text())["cases"]
HOST = re.compile(rb"(?m)^([A-Z]+ \S+ HTTP/1\.1\r\n)")
SEEDS = (
    b"GET /a?b=c HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n",
    b"PUT /d HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    b"POST /e HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
)
PIECES = (
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"1", b"-1",
    b"0x", b"\x80", b"\xff", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n", b"Host: b\r\n", b"\r\n folded", b"GET / HTTP/1.1\r\n",
    b"Connection: close\r\n", b"chunked", b"HTTP/1.0",
)  # fmt: skip
LENIENT = {
    case[1]
    for case in LLHTTP
    if case[0]
    in (
        "request/invalid:69", "request/invalid:359",  # methods that it doesn't know
        "request/transfer-encoding:331", "request/transfer-encoding:1187",  # "2;", and "a "
    )
}  # fmt: skip
"""What llhttp refuses, and this server doesn't."""

Seen = tuple[bytes, bytes, bytes]
"""A request's method, target and body."""


class Recorder(Echo):
    """Answers every request, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def handle(self, client: Answers, request: Request) -> Echo | None:
        head = request.head
        self.seen.append((head.method, head.target, b"".join(request.body)))
        return super().handle(client, request)


Send = Callable[[bytes], Awaitable[tuple[list[Seen], int]]]


@asynccontextmanager
async def sending() -> AsyncIterator[Send]:
    """Return what sends bytes on a connection; it returns the requests in them, and the status.

    That is the last answer's; 0 without one.
    """
    recorder = Recorder()

    async def send(data: bytes) -> tuple[list[Seen], int]:
        recorder.seen = []
        reader, writer = await connect()
        writer.write(data)
        writer.write_eof()
        statuses = whole(await asyncio.wait_for(reader.read(), 30), recorder.seen)
        writer.close()
        if statuses and statuses[-1] >= 400:  # the server closes though the client does not
            before, recorder.seen = recorder.seen, []
            reader, writer = await connect()
            writer.write(data)
            assert whole(await asyncio.wait_for(reader.read(), 30), recorder.seen) == statuses
            writer.close()
            assert recorder.seen == before
        return recorder.seen, statuses[-1] if statuses else 0

    async with serving(recorder, 100) as (_, connect):
        yield send


def whole(data: bytes, seen: list[Seen]) -> list[int]:
    """Return the statuses of answers, which must be complete; only the last may be a refusal."""
    client, statuses = h11.Connection(h11.CLIENT), []
    client.receive_data(data)
    client.receive_data(b"")
    for method in [method for method, _, _ in seen] + [b"GET"]:
        if not client.trailing_data[0]:
            break
        # All that h11 must know of a request is whether it was a HEAD.
        name = "HEAD" if method == b"HEAD" else "GET"
        client.send(h11.Request(method=name, target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        event = client.next_event()
        while not isinstance(event, h11.EndOfMessage):
            if isinstance(event, h11.Response):
                statuses.append(event.status_code)
                closes = (b"connection", b"close") in list(event.headers)
            event = client.next_event()
        if closes:
            break
        client.start_next_cycle()
    refused = [status for status in statuses if status != 200]
    assert statuses[: len(seen)] == [200] * len(seen)
    assert len(statuses) == len(seen) + len(refused)
    if refused:
        assert closes
    assert not client.trailing_data[0]
    return statuses


def origin_form(target: bytes) -> bytes:
    """Return a target without the host that it may have."""
    rest = re.sub(rb"^https?://[^/?]+", b"", target)
    return rest if rest.startswith((b"/", b"*")) else b"/" + rest


def read_by_h11(data: bytes) -> tuple[list[Seen], bool]:
    """Return the requests that h11 reads, and whether it could have read more.

    It keeps no connection of HTTP/1.0, allows no empty line before a request, and no tab before
    a chunk's extension.
    """
    found: list[Seen] = []
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    server.receive_data(b"")
    try:
        while True:
            event = server.next_event()
            if isinstance(event, h11.Request):
                head, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                found.append((head.method, origin_form(head.target), body))
                fields = [("Content-Length", "0")]
                server.send(h11.Response(status_code=200, headers=fields))
                server.send(h11.EndOfMessage())
                if server.our_state is not h11.DONE:
                    return found, True
                server.start_next_cycle()
            else:
                return found, False
    except h11.RemoteProtocolError as error:
        return found, "no request line" in str(error) or b"\t;" in data


def mutated(chance: random.Random) -> bytes:
    """Return one to three requests with one to three faults."""
    data = bytearray(b"".join(chance.choices(SEEDS, k=chance.randint(1, 3))))
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data))
        kind = chance.randrange(5)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            data[at:at] = chance.choice(PIECES)
        elif kind == 2:
            del data[at : at + chance.choice((1, 1, 2, 8))]
        elif kind == 3:
            lines = data.split(b"\r\n")
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            data = bytearray(b"\r\n".join(lines))
        else:
            end = at + chance.choice((1, 2, 8))
            data[at:end] = chance.choice(PIECES)
    return bytes(data)


def test_mutated_requests_are_read_as_h11_reads_them_or_refused() -> None:
    chance = random.Random(73)

    async def run() -> None:
        async with sending() as send:
            for number in range(MUTATIONS):
                data = mutated(chance)
                ours, _ = await send(data)
                theirs, more = read_by_h11(data)
                common = min(len(ours), len(theirs))
                assert ours[:common] == theirs[:common], (number, data)
                assert more or len(ours) <= len(theirs), (number, data)

    uvloop.run(run())


def cases(kind: str) -> pytest.MarkDecorator:
    """Return llhttp's inputs of a kind, and the messages that it reads strictly, if it does."""
    found = [case for case in LLHTTP if case[0].startswith(kind)]
    names = [case[0] for case in found]
    return pytest.mark.parametrize(("text", "messages"), [case[1:3] for case in found], ids=names)


@cases("request/")
def test_requests_of_llhttp_are_read_as_it_reads_them_or_refused(
    text: str, messages: list[list[str]] | None
) -> None:
    """With a host, which most of them lack."""
    data = text.encode("latin-1")
    if b"\nhost:" not in data.lower():
        data = HOST.sub(rb"\1Host: a\r\n", data)

    async def run() -> None:
        async with sending() as send:
            ours, _ = await send(data)
            if messages is not None:
                parts = [[part.encode("latin-1") for part in each] for each in messages]
                theirs = [(method, origin_form(url), body) for method, url, body in parts]
                common = min(len(ours), len(theirs))
                assert ours[:common] == theirs[:common]
                assert text in LENIENT or len(ours) <= len(theirs)

    uvloop.run(run())


@cases("response/")
def test_answers_of_llhttp_are_read_as_it_reads_them_or_refused(
    text: str, messages: list[tuple[int, str]] | None
) -> None:
    """And what follows an answer is never taken for that to the next request."""
    sent = [text.encode("latin-1"), b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sent.pop(0))
            await writer.drain()
            writer.write_eof()
            await reader.read()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = HttpClient(parse_origin(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        try:
            with contextlib.suppress(Broken):
                found = await client.ask("GET", "/", 5.0)
                finals = [each for each in messages or () if each[0] >= 200]
                if finals:
                    assert [found.status, found.body] == [finals[0][0], finals[0][1].encode()]
            assert (await client.ask("GET", "/", 5.0)).body == b"right"
        finally:
            client.close()
            server.close()

    uvloop.run(run())
