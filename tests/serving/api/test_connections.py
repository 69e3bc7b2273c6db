"""What a client may take before it is known."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
import uvloop

from codedinvnet.net import listening
from codedinvnet.net.listening import allow_files, bind
from codedinvnet.net.logs import Quiet
from codedinvnet.serving.api import connections
from codedinvnet.serving.api.bodies import GONE
from codedinvnet.serving.api.connections import BoundedHttp
from tests.observing import until

REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n"


left: list[str] = []
"""Paths of requests whose clients were seen to leave."""


async def answer(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    if scope["path"] == "/body":
        await body_again(receive, send)
        return
    if scope["path"] == "/patient":
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(scope["extensions"][GONE]), 3)
            left.append(scope["path"])
            return
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def body_again(receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    """Answer with the request's body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    length = str(len(body)).encode()
    headers = [(b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Http(BoundedHttp):
    most = 3


@asynccontextmanager
async def serving(
    http: type[BoundedHttp] = Http, timeout_keep_alive: int = 5
) -> AsyncIterator[Any]:
    """Serve on a free port; yields a function that connects."""
    config = uvicorn.Config(
        answer,
        http=http,
        lifespan="off",
        log_config=None,
        timeout_keep_alive=timeout_keep_alive,
    )
    listener, server = bind("127.0.0.1", 0), uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    writers = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writers.append(writer)
        return reader, writer

    try:
        await until(lambda: server.started)
        yield connect
    finally:
        for writer in writers:
            writer.close()
        server.should_exit = True
        await task


async def ended(reader: asyncio.StreamReader, began: float | None = None) -> float:
    """Return the seconds, from now if nobody says, until it is closed without an answer."""
    began = time.monotonic() if began is None else began
    with suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 30) == b""
    return time.monotonic() - began


async def answered(reader: asyncio.StreamReader) -> None:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    assert head.startswith(b"HTTP/1.1 204")


@pytest.mark.parametrize("sent", [b"", REQUEST], ids=["nothing", "half"])
async def test_headers_that_do_not_come(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)

    async with serving() as connect:
        began = time.monotonic()
        reader, writer = await connect()
        writer.write(sent)
        assert 0.2 < await ended(reader, began) < 5


async def test_a_later_requests_headers_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)

    async with serving() as connect:
        reader, writer = await connect()
        writer.write(REQUEST + b"\r\n")
        await answered(reader)
        await asyncio.sleep(0.6)  # idle connections stay
        writer.write(REQUEST + b"\r\n")
        await answered(reader)
        began = time.monotonic()
        writer.write(REQUEST)
        assert 0.2 < await ended(reader, began) < 5


async def test_an_answer_may_take_longer_than_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.4)

    async with serving() as connect:
        reader, writer = await connect()
        writer.write(REQUEST.replace(b"/ ", b"/slow ", 1) + b"\r\n" + REQUEST)
        await answered(reader)
        writer.write(b"\r\n")
        await answered(reader)


async def test_headers_without_an_end() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        line = b"X-Long: " + b"x" * 1000 + b"\r\n"
        writer.write(REQUEST + 60 * line + b"\r\n")
        await answered(reader)
        writer.write(REQUEST + 60 * line)
        await writer.drain()
        await asyncio.sleep(0.1)
        assert not reader.at_eof()
        writer.write(70 * line)
        assert await ended(reader) < 5


async def test_a_body_is_not_taken_for_headers() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        for _ in range(3):
            head = REQUEST.replace(b"GET", b"POST") + b"Content-Length: 100000\r\n\r\n"
            writer.write(head + bytes(100_000))
            await answered(reader)


CHUNKED = REQUEST.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent", [b"0\r\n" + 20_000 * b"a:b\r\n", b"0\r\na:" + bytes(100_000), b"0;" + 100_000 * b"x"]
)
async def test_what_follows_a_body_is_bounded_and_dropped(sent: bytes) -> None:
    """Trailers come after the answer, when nobody looks at the connection any more."""
    kept: list[int] = []

    class Noted(Http):
        def connection_lost(self, exc: Exception | None) -> None:
            kept.append(len(self.headers))
            super().connection_lost(exc)

    async with serving(Noted) as connect:
        reader, writer = await connect()
        writer.write(CHUNKED)
        await answered(reader)
        for start in range(0, len(sent), 1000):  # not all at once: that is read as one
            writer.write(sent[start : start + 1000].replace(b"\0", b"x"))
            await asyncio.sleep(0.001)
        assert await ended(reader) < 5
    assert kept == [2]  # Host and Transfer-Encoding


async def test_trailers_are_no_fault() -> None:
    async with serving() as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(CHUNKED + b"3\r\nabc\r\n0\r\na: b\r\n\r\n")
            await answered(reader)


async def test_connections_have_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Http, "refused", Quiet())
    async with serving() as connect:
        kept = [await connect() for _ in range(Http.most)]
        for reader, writer in kept:
            writer.write(REQUEST + b"\r\n")
            await answered(reader)
        reader, _ = await connect()
        assert await ended(reader) < 5
        assert "connection refused" in caplog.messages
        kept[0][1].close()
        await asyncio.sleep(0.1)
        reader, writer = await connect()
        writer.write(REQUEST + b"\r\n")
        await answered(reader)


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_offer_of_another_protocol_is_overlooked(size: int) -> None:
    """Java's client and `curl --http2` send a body with it."""
    post = b"POST /body HTTP/1.1\r\nHost: test\r\n" + UPGRADE
    sent = post + b"Content-Length: 3\r\n\r\nabc"
    sent += post + b"Transfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\n"
    sent += b"GET /body HTTP/1.1\r\nHost: test\r\n" + UPGRADE + b"\r\n"
    sent += post + b"Connection: close\r\nContent-Length: 2\r\n\r\ngh"

    async with serving() as connect:
        reader, writer = await connect()
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await writer.drain()
        parts = (await asyncio.wait_for(reader.read(), 30)).split(b"HTTP/1.1 200 OK\r\n")
        assert [part.partition(b"\r\n\r\n")[2] for part in parts[1:]] == [
            b"abc",
            b"def",
            b"",
            b"gh",
        ]


PATIENT = REQUEST.replace(b"/ ", b"/patient ") + b"\r\n"


@pytest.mark.parametrize("sent", [PATIENT, REQUEST + b"\r\n" + 2 * PATIENT + CHUNKED])
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_client_that_leaves_is_noticed(runner: Callable[[Any], None], sent: bytes) -> None:
    """It may have sent other requests by then, or half of one."""

    async def run() -> None:
        async with serving() as connect:
            _, writer = await connect()
            writer.write(sent)
            await asyncio.sleep(0.1)
            writer.close()
            for _ in range(40):
                if left:
                    break
                await asyncio.sleep(0.05)

    left.clear()
    runner(run())
    assert left == ["/patient"]


@pytest.mark.skipif(sys.platform != "linux", reason="its kernel does it")
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_a_client_that_does_not_read_keeps_no_connection(
    runner: Callable[[Any], None], close: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        lost = asyncio.Event()

        class Noted(Http):
            def connection_lost(self, exc: Exception | None) -> None:
                lost.set()
                super().connection_lost(exc)

        async with serving(Noted, timeout_keep_alive=1) as connect:
            _, writer = await connect()
            writer.transport.pause_reading()
            head = REQUEST.replace(b"GET /", b"POST /body") + close
            writer.write(head + b"Content-Length: 32000000\r\n\r\n" + bytes(32_000_000))
            await asyncio.wait_for(lost.wait(), 30)

    monkeypatch.setattr(listening, "UNREAD", 0.5)
    runner(run())


@pytest.mark.parametrize(
    ("limits", "wanted", "most"),
    [
        ((1024, 4096), (4096, 4096), 512),
        ((1024, resource.RLIM_INFINITY), (1 << 20, resource.RLIM_INFINITY), 512),
        ((1024, 1 << 30), (1 << 20, 1 << 30), 512),
        ((256, 256), None, 16),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, 1 << 19),
    ],
)
def test_the_limit_on_files_is_raised_and_half_of_them_are_connections(
    limits: tuple[int, int],
    wanted: tuple[int, int] | None,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def refuses(_: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        raise ValueError("not allowed")  # as macOS may: the limit is left as it is then

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", refuses)
    assert allow_files() == most
    assert asked == ([] if wanted is None else [wanted])
