"""The HTTP server by itself: connections, and clients that are slow, gone or old."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from codedinvnet.net import listening, server
from codedinvnet.net.answers import HIGH, Answers, Reply
from codedinvnet.net.http1 import RequestHead, read_response
from codedinvnet.net.listening import allow_files, bind
from codedinvnet.net.logs import Quiet
from codedinvnet.net.memory import Memory
from codedinvnet.net.requests import Request
from codedinvnet.net.server import HttpServer
from tests.observing import until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
PATIENT = b"GET /patient HTTP/1.1\r\nHost: a\r\n\r\n"


class Echo:
    """Answers with the request's body; at /patient never, until the client leaves.

    Args:
        padding: what its answers begin with.
    """

    def __init__(self, padding: bytes = b"") -> None:
        self.memory, self.left, self.padding = Memory(1 << 30), False, padding
        self.asked: list[str] = []
        self.clients: list[Answers] = []

    def most_body(self, head: RequestHead) -> int:
        return 1 << 26

    def trusts(self, head: RequestHead) -> bool:
        return True

    def precheck(self, head: RequestHead) -> Reply | None:
        return None

    def handle(self, client: Answers, request: Request) -> Echo | None:
        self.asked.append(request.head.path)
        if request.head.path == "/patient":
            self.clients.append(client)
            return self
        client.reply(Reply(200, self.padding + b"".join(request.body)))
        self.memory.give(request.size)
        return None

    def replied(self, head: RequestHead | None, status: int, client: Answers) -> None: ...

    def gone(self) -> None:
        self.left = True

    def pause(self) -> None: ...

    def resume(self) -> None: ...


Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@asynccontextmanager
async def serving(echo: Echo, most: int = 3) -> AsyncIterator[tuple[HttpServer, Connect]]:
    served, listener = HttpServer(echo, echo.memory, most), bind("127.0.0.1", 0)
    await served.listen(listener, None)
    writers = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writers.append(writer)
        return reader, writer

    try:
        yield served, connect
    finally:
        for writer in writers:
            writer.transport.abort()
        await served.stop(5.0)


async def test_connections_have_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that wait for answers stay, and the one that is idle longest makes room."""
    monkeypatch.setattr(HttpServer, "refused", Quiet())
    async with serving(echo := Echo()) as (served, connect):
        kept = [await connect() for _ in range(3)]
        for _, writer in kept:
            writer.write(b"GET /patient HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: len(echo.clients) == 3)
        reader, _ = await connect()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        assert "connection refused" in caplog.messages
        for client in echo.clients:
            client.reply(Reply(200, b""))
        for reader, _ in kept:
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        reader, writer = await connect()
        writer.write(GET + b"\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        assert await kept[0][0].read() == b""
        assert len(served.connections) == 3


async def test_those_that_have_asked_nothing_make_room_first() -> None:
    async with serving(Echo()) as (_, connect):
        reader, writer = await connect()
        writer.write(GET + b"\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        for _ in range(10):
            await connect()
        writer.write(GET + b"\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")


async def test_a_later_requests_head_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection stays, and one with half a head does not."""
    monkeypatch.setattr(server, "HEAD_TIMEOUT", 0.2)
    monkeypatch.setattr(server, "SWEEP", 0.05)
    async with serving(Echo()) as (_, connect):
        reader, writer = await connect()
        for _ in range(2):
            writer.write(GET + b"\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.4)
        writer.write(GET)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408 ")


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_offer_of_another_protocol_is_overlooked(size: int) -> None:
    """Java's client and `curl --http2` send a body with it."""
    post = b"POST / HTTP/1.1\r\nHost: a\r\n" + UPGRADE
    sent = post + b"Content-Length: 3\r\n\r\nabc"
    sent += post + b"Transfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\nA: b\r\n\r\n"
    sent += GET + UPGRADE + b"\r\n"
    sent += post + b"Connection: close\r\nContent-Length: 2\r\n\r\ngh"
    async with serving(Echo()) as (_, connect):
        reader, writer = await connect()
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await writer.drain()
        parts = (await asyncio.wait_for(reader.read(), 30)).split(b"HTTP/1.1 200 OK\r\n")
    bodies = [part.partition(b"\r\n\r\n")[2] for part in parts[1:]]
    assert bodies == [b"abc", b"def", b"", b"gh"]


async def test_old_clients_and_methods_without_a_body() -> None:
    async with serving(Echo()) as (_, connect):
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"\r\nConnection: keep-alive\r\n" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HEAD / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    assert b"\r\nContent-Length: 3\r\n" in head
    assert b"\r\nDate: " in head
    assert (b"\r\nConnection: close" in head, body) == (True, b"")


@pytest.mark.parametrize("sent", [PATIENT, GET + b"\r\n" + 2 * PATIENT])
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_client_that_leaves_is_noticed(
    runner: Callable[[Awaitable[None]], None], sent: bytes
) -> None:
    """It may have sent other requests by then."""
    echo = Echo()

    async def run() -> None:
        async with serving(echo) as (_, connect):
            _, writer = await connect()
            writer.write(sent)
            await asyncio.sleep(0.1)
            writer.close()
            await until(lambda: echo.left)

    runner(run())


async def test_answers_that_a_client_does_not_read_do_not_pile_up() -> None:
    echo, count = Echo(padding=bytes(1 << 14)), 2000
    async with serving(echo) as (served, connect):
        reader, writer = await connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(count * (GET + b"\r\n"))
        await until(lambda: served.memory.used >= HIGH)
        await asyncio.sleep(0.1)
        assert len(echo.asked) < count
        assert served.memory.peak < 3 * HIGH

        writer.transport.resume_reading()  # type: ignore[attr-defined]
        writer.write_eof()
        answers = await asyncio.wait_for(reader.read(), 30)
    assert answers.count(b"HTTP/1.1 200 OK") == count
    assert served.memory.used == 0


async def test_a_client_with_many_requests_leaves_others_their_turns() -> None:
    echo = Echo()
    async with serving(echo) as (_, connect):
        (_, many), (reader, one) = await connect(), await connect()
        many.write(1000 * b"GET /many HTTP/1.1\r\nHost: a\r\n\r\n")
        one.write(b"GET /one HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
    assert echo.asked.index("/one") < 10


async def test_a_body_in_tiny_chunks_leaves_others_their_turns() -> None:
    received = []

    class Watching(Echo):
        def handle(self, client: Answers, request: Request) -> Echo | None:
            received.append(sum(each.reader.size for each in served.connections))
            return super().handle(client, request)

    async with serving(Watching()) as (served, connect):
        (echoed, many), (reader, one) = await connect(), await connect()
        many.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.05)
        many.write(40_000 * b"1\r\na\r\n" + b"0\r\n\r\n")
        one.write(GET + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await echoed.readuntil(b"a" * 40_000)
    assert received[0] < 5000


@pytest.mark.parametrize("size", [7, 10_000])
async def test_all_requests_before_a_half_close_are_answered(size: int) -> None:
    sent = 50 * (GET + b"Content-Length: 2\r\n\r\nab") + b"GET / HT"
    async with serving(Echo()) as (_, connect):
        reader, writer = await connect()
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await writer.drain()
        writer.write_eof()
        answers = await asyncio.wait_for(reader.read(), server.HEAD_TIMEOUT / 2)
    assert answers.count(b"\r\n\r\nab") == 50


@pytest.mark.parametrize(("version", "count"), [(b"1.1", 1), (b"1.0", 0)])
async def test_clients_that_wait_are_told_to_go_on(version: bytes, count: int) -> None:
    """Those of HTTP/1.0 know no such answer."""
    async with serving(Echo()) as (_, connect):
        reader, writer = await connect()
        writer.write(b"POST / HTTP/" + version + b"\r\nHost: a\r\nConnection: close\r\n")
        writer.write(b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.write(b"ab")
        answers = await asyncio.wait_for(reader.read(), 10)
    assert answers.count(b"100 Continue") == count
    assert answers.endswith(b"\r\n\r\nab")


@pytest.mark.parametrize(
    ("answer", "body", "sent"),
    [
        (b"204 No Content\r\nContent-Length: 5\r\n\r\n", b"", b"204 No Content\r\n\r\n"),
        (
            b"200 OK\r\nConnection: Content-Length\r\nContent-Length: 2\r\n\r\n",
            b"ok",
            b"200 OK\r\nContent-Length: 2\r\n\r\nok",
        ),
        (
            b"200 OK\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"ok",
            b"200 OK\r\nContent-Length: 2\r\n\r\nok",
        ),
        (
            b"304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"",
            b"304 Not Modified\r\n\r\n",
        ),
    ],
)
async def test_an_upstreams_answer_has_an_end_on_a_kept_connection(
    answer: bytes, body: bytes, sent: bytes
) -> None:
    echo = Echo()
    async with serving(echo) as (_, connect):
        reader, writer = await connect()
        writer.write(PATIENT + GET + b"Connection: close\r\n\r\n")
        await until(lambda: len(echo.clients) == 1)
        head = read_response(b"HTTP/1.1 " + answer)
        echo.clients[0].respond(head, [], [body] if body else [], [], True)
        answers = await asyncio.wait_for(reader.read(), 10)
    assert answers.startswith(b"HTTP/1.1 " + sent + b"HTTP/1.1 200 OK\r\n")


async def test_a_connection_that_is_kept_may_have_a_last_request_while_the_server_drains() -> None:
    async with serving(Echo()) as (served, connect):
        reader, writer = await connect()
        silent, _ = await connect()
        await until(lambda: len(served.connections) == 2)
        draining = asyncio.ensure_future(served.stop(10.0))
        await asyncio.sleep(0.1)
        writer.write(GET + b"\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nConnection: close\r\n" in answer
        writer.close()
        await asyncio.wait_for(draining, server.LAST_REQUESTS + server.LINGER + 3.0)
        assert await silent.read() == b""


async def test_requests_that_came_before_the_server_drains_are_answered() -> None:
    """And those behind them, the last of which is told that it is."""
    echo = Echo()
    async with serving(echo) as (served, connect):
        reader, writer = await connect()
        writer.write(PATIENT + 2 * (GET + b"\r\n"))
        await until(lambda: len(echo.clients) == 1)
        draining = asyncio.ensure_future(served.stop(10.0))
        await asyncio.sleep(0.1)
        echo.clients[0].reply(Reply(200, b"late"))
        answers = (await asyncio.wait_for(reader.read(), 10)).split(b"HTTP/1.1 200 OK\r\n")
        writer.close()
        await draining
    assert [b"Connection: close" in answer for answer in answers] == [False, False, False, True]


async def test_a_stream_that_ends_while_the_server_drains_may_have_a_successor() -> None:
    """Its head said that the connection is kept."""
    echo = Echo()
    async with serving(echo) as (served, connect):
        reader, writer = await connect()
        writer.write(PATIENT)
        await until(lambda: len(echo.clients) == 1)
        (client,) = echo.clients
        client.respond(read_response(b"HTTP/1.1 200 OK\r\n\r\n"), [], [b"a"], [], False)
        await reader.readuntil(b"a\r\n")
        draining = asyncio.ensure_future(served.stop(10.0))
        await asyncio.sleep(0.05)
        client.end_body([])
        await asyncio.sleep(0.05)
        writer.write(GET + b"\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await draining
    assert answer.startswith(b"0\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in answer


async def test_a_request_that_was_not_read_yet_is_answered_before_the_connection_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "LAST_REQUESTS", 0.1)
    async with serving(Echo()) as (served, connect):
        reader, writer = await connect()
        await until(lambda: len(served.connections) == 1)
        own = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        draining = asyncio.ensure_future(served.stop(10.0))
        await asyncio.sleep(0.05)
        own.send(GET + b"\r\n")
        own.close()
        time.sleep(0.2)  # a busy loop: the time is up before it reads
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
        await draining


@pytest.mark.skipif(sys.platform != "linux", reason="its kernel does it")
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_client_that_does_not_read_keeps_no_connection(
    runner: Callable[[Awaitable[None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with serving(Echo()) as (served, connect):
            _, writer = await connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(GET + b"Content-Length: 32000000\r\n\r\n" + bytes(32_000_000))
            await until(lambda: served.memory.peak >= 32_000_000)
            await until(lambda: not served.connections)
            assert served.memory.used == 0

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
