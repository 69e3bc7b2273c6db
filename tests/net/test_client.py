"""The client of HTTP/1.1: whole answers, streams, kept connections, and servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.net.client import Broken, HttpClient, parse_origin
from codedinvnet.net.http1 import Fields, ResponseHead
from codedinvnet.net.resolve import Address, Resolver
from tests.upstream import Raw

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def client_of(serve: Serve) -> AsyncIterator[HttpClient]:
    async with Raw(serve) as server:
        client = HttpClient(parse_origin(server.url))
        try:
            yield client
        finally:
            client.close()


def answering(*answers: bytes, close: bool = False) -> Serve:
    """Return what answers the requests of each connection, which have no body, in turn."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            for part in answer.split(b"|"):
                if writer.is_closing():
                    return
                writer.write(part)
                await asyncio.sleep(0.005)
        if close:
            writer.close()
        else:
            await reader.read()
            writer.close()

    return serve


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (OK, b"ok", 1),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok", 1),
        (b"HTTP/1.1 200 OK\r\nConte|nt-Length: 2\r|\n\r\no|k", b"ok", 1),
        (CHUNKED + b"1\r\no|\r\n1\r\nk\r\n0\r\n\r\n", b"ok", 1),
        (CHUNKED + 5000 * b"1\r\no\r\n" + b"0\r\n\r\n", 5000 * b"o", 1),
        (CHUNKED + 5000 * b"1\r\no\r\n" + b"0\r\n\r\n" + OK, 5000 * b"o", 0),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 1),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", 0),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", 0),
        (OK + b"HTTP/1.1 200 OK\r\n", b"ok", 0),
        (OK + b"|HTTP/1.1 200 OK\r\n", b"ok", 0),
    ],
)  # fmt: skip
async def test_whole_answers(answer: bytes, body: bytes, kept: int) -> None:
    async with client_of(answering(answer)) as client:
        found = await client.ask("GET", "/", 5.0)
        await asyncio.sleep(0.03)

        assert (found.body, client.idle) == (body, kept)


async def test_a_body_may_end_with_the_connection() -> None:
    async with client_of(answering(b"HTTP/1.1 200 OK\r\n\r\nall| of it", close=True)) as client:
        assert (await client.ask("GET", "/", 5.0)).body == b"all of it"
        assert client.idle == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + OK,
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        1000 * b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"|".join(100 * [b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"]) + OK,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_an_answer_that_is_cut_or_malformed(answer: bytes) -> None:
    async with client_of(answering(answer, close=True)) as client:
        with pytest.raises(Broken):
            await client.ask("GET", "/", 5.0)


async def test_a_request_is_written_once_more_if_a_kept_connection_was_closed() -> None:
    async with client_of(answering(OK, close=True)) as client:
        for _ in range(3):
            assert (await client.ask("GET", "/", 5.0)).body == b"ok"


async def test_a_kept_connection_with_unread_bytes_is_not_used() -> None:
    """A server sends a second answer while this process is busy with something else."""
    listener = socket.create_server(("127.0.0.1", 0))
    answered: list[int] = []

    def serve() -> None:
        for number in range(2):
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.sendall(OK)
            answered.append(number)
            if number == 0:
                time.sleep(0.02)
                connection.sendall(OK.replace(b"ok", b"no"))
            kept.append(connection)

    kept: list[socket.socket] = []
    thread = threading.Thread(target=serve)
    thread.start()
    client = HttpClient(parse_origin(f"http://127.0.0.1:{listener.getsockname()[1]}"))
    for _ in range(2):
        assert (await client.ask("GET", "/", 5.0)).body == b"ok"
        time.sleep(0.1)  # nothing is read meanwhile
    thread.join()
    client.close()
    await asyncio.sleep(0.01)
    for each in (listener, *kept):
        each.close()

    assert answered == [0, 1]


async def test_no_answer_in_time() -> None:
    async with client_of(answering(b"HTTP/1.1 200 OK\r\n")) as client:
        with pytest.raises(Broken, match=r"within 0\.2 s"):
            await client.ask("GET", "/", 0.2)


class Slow:
    """Receives a stream, and stops reading at once."""

    def __init__(self) -> None:
        self.size, self.ended, self.lost = 0, asyncio.Event(), asyncio.Event()

    def on_head(self, head: ResponseHead) -> None:
        pass

    def on_body(self, data: bytes) -> None:
        self.size += len(data)

    def on_end(self, trailers: Fields) -> None:
        self.ended.set()

    def on_lost(self, error: Exception) -> None:
        self.lost.set()


async def test_a_stream_waits_for_its_reader_and_ends_when_it_is_cancelled() -> None:
    gone, size = asyncio.Event(), 64 << 20

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        try:
            for _ in range(size >> 16):
                writer.write(bytes(1 << 16))
                await writer.drain()
        except ConnectionError:
            gone.set()

    async with client_of(serve) as client:
        connection, slow = await client.connect(), Slow()
        connection.send(slow, b"GET", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
        while not slow.size:
            await asyncio.sleep(0.001)
        connection.pause()
        await asyncio.sleep(0.05)
        before = slow.size
        await asyncio.sleep(0.05)
        assert slow.size == before < size
        connection.resume()
        while slow.size == before:
            await asyncio.sleep(0.001)
        connection.abort()
        await asyncio.wait_for(gone.wait(), 5.0)

        assert not slow.ended.is_set()
        assert not slow.lost.is_set()


async def test_a_stream_in_tiny_chunks_waits_for_its_reader() -> None:
    class Hesitant(Slow):
        def on_body(self, data: bytes) -> None:
            super().on_body(data)
            if self.size == len(data):
                connection.pause()

    size = 1_000_000
    async with client_of(answering(CHUNKED + size * b"1\r\na\r\n" + b"0\r\n\r\n")) as client:
        connection, slow = await client.connect(), Hesitant()
        connection.send(slow, b"GET", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
        await asyncio.sleep(0.3)
        assert 0 < slow.size < size // 10
        connection.resume()
        await asyncio.wait_for(slow.ended.wait(), 30.0)
        assert (slow.size, client.idle) == (size, 1)


async def test_a_lookup_that_hangs_stops_nobody_else() -> None:
    over = threading.Event()

    def lookup(host: str, port: int) -> list[Address]:
        if host == "hangs":
            over.wait()
        return socket_address(port)

    resolver = Resolver(lookup, seconds=0.2, most=2)
    waits = [resolver.resolve("hangs", port) for port in (1, 1, 1)]
    found = await asyncio.gather(*waits, resolver.resolve("b", 2), return_exceptions=True)

    assert [isinstance(one, OSError) for one in found] == [True, True, True, False]
    assert (await resolver.resolve("127.0.0.1", 3))[0][4] == ("127.0.0.1", 3)
    assert (await resolver.resolve("c", 3))[0][4] == ("127.0.0.1", 3)
    over.set()


def socket_address(port: int) -> list[Address]:
    from codedinvnet.net.resolve import literal

    return literal("127.0.0.1", port)


async def test_a_client_of_a_name_connects_on_its_resolver() -> None:
    async with client_of(answering(OK)) as client:
        port = client.origin.port
        named = HttpClient(
            parse_origin(f"http://model.test:{port}"),
            resolver=Resolver(lambda host, port: socket_address(port)),
        )
        assert (await named.ask("GET", "/", 5.0)).body == b"ok"
        named.close()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "url",
    ["a:80", "ftp://a", "http://", "http://a:b", "http://u:p@a", "http://a#b", "http://a?b",
     "http://a b", "https://a#" + "b" * 70],
)  # fmt: skip
def test_urls_that_name_no_server(url: str) -> None:
    with pytest.raises(UserError, match="--upstream"):
        parse_origin(url)
