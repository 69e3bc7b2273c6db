"""Answers of servers that do what a well-behaved one seldom does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from codedinvnet.serving.gateway import http_client
from codedinvnet.serving.gateway.calls import Call, Unreachable
from codedinvnet.serving.gateway.http_client import Broken, HttpClient
from codedinvnet.serving.gateway.upstreams import open_upstream
from tests.observing import until

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: \xc3\xbc\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n"
HUNG_UP = b""
"""What a server says that hangs up on a request."""


class Server:
    """Answers requests with what it was given, one after another; without a length it hangs up."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.seen, self.connections = list(answers), list[bytes](), 0
        self.at_it: set[Any] = set()
        self.open: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.at_it.add(asyncio.current_task())
        self.open.add(writer)
        with contextlib.suppress(ConnectionError):
            while head := await reader.read(65536):
                self.seen.append(head)
                answer = self.answers.pop(0)
                writer.write(answer)
                if answer == HUNG_UP or b"\r\nContent-Length" not in answer:
                    break
        self.open.discard(writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def asking(*answers: bytes) -> AsyncIterator[tuple[Server, HttpClient]]:
    server = Server(*answers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    client = HttpClient("127.0.0.1", listening.sockets[0].getsockname()[1], None)
    yield server, client
    client.close()
    listening.close()
    await asyncio.gather(*server.at_it)


async def test_an_answer_is_as_it_came() -> None:
    async with asking(WHOLE, WHOLE) as (server, client):
        for _ in range(2):
            status, headers, body = await client.ask("POST", "/p", 5, b"body", (("x-b", "ü"),))
            assert (status, body) == (200, b"hi")
            assert ("x-a", "Ã¼") in headers
        line, *sent = server.seen[0].split(b"\r\n")
        assert line == b"POST /p HTTP/1.1"
        assert sent[-1] == b"body"
        assert {b"x-b: \xfc", b"Content-Length: 4"} <= set(sent)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil it ends", b"until it ends"),
        (CHUNKED, b"hi!"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, b"hi"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
async def test_bodies_that_end_otherwise(answer: bytes, body: bytes) -> None:
    async with asking(answer) as (_, client):
        assert (await client.ask("GET", "/", 5)).body == body


@pytest.mark.parametrize(
    "answer",
    [
        HUNG_UP,
        b"HTTP/1.1 200 OK\r\nX-A: cut sho",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ncut short",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_no_answer(answer: bytes) -> None:
    async with asking(answer, WHOLE) as (server, client):
        with pytest.raises(ConnectionError):
            await client.ask("GET", "/", 5, tries=2)
        assert server.connections == 1  # asked anew only if a kept connection was closed
        assert (await client.ask("GET", "/", 5)).body == b"hi"


def of(size: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (of(990_000), "its answer took more than 600000 bytes"),
        (CHUNKED[:-5] + 60_000 * b"1\r\nx\r\n" + CHUNKED[-5:], "its answer took more than 600000"),
        (b"HTTP/1.1 200 OK\r\nX-B: " + 990_000 * b"b", "its headers took more than 300000"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 40_000 + WHOLE, "its headers took more than 300000"),
    ],
    ids=["body", "chunks", "header", "interim answers"],
)
async def test_an_answer_may_be_so_large_and_no_larger(
    answer: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the server goes on; the next one counts anew."""
    async with asking(answer, *[of(400_000)] * 3) as (server, client):
        monkeypatch.setattr(http_client, "LARGEST", 600_000)
        monkeypatch.setattr(http_client, "MOST_HEAD", 300_000)
        with pytest.raises(Broken, match=told):
            await client.ask("GET", "/", 5)
        for _ in range(3):
            assert len((await client.ask("GET", "/", 5)).body) == 400_000
        assert server.connections == 2


async def test_what_follows_a_body_is_no_header() -> None:
    """It would say another length of the JSON part."""
    sent = CHUNKED.replace(b"\r\n\r\n2", b"\r\nX-Length: 2\r\n\r\n2")
    async with asking(sent[:-2] + b"X-Length: 1\r\nX-More: 1\r\n\r\n") as (_, client):
        _, headers, body = await client.ask("GET", "/", 5)
    assert body == b"hi!"
    assert headers == (("transfer-encoding", "chunked"), ("x-length", "2"))


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_who_hangs_up_before_it_was_asked_has_refused(run: Callable[..., None]) -> None:
    """Nothing was sent: the request is none that connections break by."""
    url = ""

    def hang_up(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listening.accept()[0].close()

    async def ask() -> None:
        refused, began = [], time.monotonic()
        for _ in range(20):  # it may be asked before it has hung up
            upstream = open_upstream(url)
            with pytest.raises(Unreachable) as error:
                await upstream.infer(Call("m", "", "http", b"{}", (), 0.0), 10.0)
            refused.append(not error.value.sent)
            await upstream.close()
        # asyncio's own loop asks before it looks whether there is an end, since Python 3.12.
        assert any(refused) or (run is asyncio.run and sys.version_info >= (3, 12))
        assert time.monotonic() - began < 10.0

    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=hang_up, args=(listening,), daemon=True)
        thread.start()
        run(ask())
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


async def test_a_kept_connection_that_is_closed_is_asked_anew() -> None:
    async with asking(WHOLE, HUNG_UP, WHOLE, HUNG_UP) as (server, client):
        await client.ask("GET", "/", 5)
        assert (await client.ask("GET", "/", 5, tries=2)).body == b"hi"
        assert server.connections == 2
        with pytest.raises(ConnectionError):
            await client.ask("GET", "/", 5)


async def test_a_request_may_have_come_where_no_second_connection_is_made_in_time() -> None:
    async with asking(WHOLE, HUNG_UP) as (_, client):
        await client.ask("GET", "/", 5)
        client.connect = 0.0
        with pytest.raises(Broken, match=r"^it hung up, and then: no connection within 0 s$"):
            await client.ask("GET", "/", 5, tries=2)


async def test_connections_that_are_not_needed_any_more_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_client, "LONGEST_IDLE", 0.5)
    async with asking(*[WHOLE] * 100) as (server, client):
        await asyncio.gather(*(client.ask("GET", "/", 5) for _ in range(4)))
        assert len(server.open) == server.connections == 4
        for _ in range(20):  # one is enough from now on
            await client.ask("GET", "/", 5)
            await asyncio.sleep(0.05)
        await until(lambda: len(server.open) == 1)


async def test_a_connection_is_not_used_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is always busy."""
    monkeypatch.setattr(http_client, "OLDEST", 0.3)
    async with asking(*[WHOLE] * 10_000) as (server, client):
        end = asyncio.get_running_loop().time() + 20.0
        while server.connections < 3:
            assert (await client.ask("GET", "/", 5)).body == b"hi"
            await asyncio.sleep(0.005)
            assert asyncio.get_running_loop().time() < end
        await until(lambda: len(server.open) == 1)


@pytest.mark.parametrize("second", [WHOLE.replace(b"hi", b"no"), WHOLE[:-2], WHOLE[:1]])
async def test_two_answers_in_one_piece(second: bytes) -> None:
    """Though the second may not be whole."""
    async with asking(WHOLE + second, WHOLE) as (server, client):
        for _ in range(2):
            assert (await client.ask("GET", "/", 5)).body == b"hi"
        assert server.connections == 2


async def test_a_silent_server_and_a_header_of_two_lines() -> None:
    silent = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    async with asking(silent, silent, WHOLE) as (server, client):
        with pytest.raises(asyncio.TimeoutError):
            await client.ask("GET", "/", 0.4)
        asked = asyncio.create_task(client.ask("GET", "/", 5))
        await until(lambda: len(server.seen) == 2)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await client.ask("GET", "/", 5)).body == b"hi"
        assert server.connections == 3
        for value in ("a\r\nY: b", "a\rY: b", "a\nY: b"):
            with pytest.raises(ConnectionError):
                await client.ask("GET", "/", 5, headers=(("x", value),))
        assert len(server.seen) == 3


async def test_who_makes_no_connection_is_told_from_who_does_not_answer() -> None:
    """A server that stands still: the kernel connects, and nobody shakes hands over TLS."""
    call = Call("m", "", "http", b"{}", (), 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for scheme, connect, told in (
            ("https", 0.2, "no connection within 0.2 s"),
            ("https", 60.0, "no connection within 0.5 s"),
            ("http", 0.2, "no answer within 0.5 s"),
        ):
            upstream = open_upstream(f"{scheme}://127.0.0.1:{port}", connect=connect)
            with pytest.raises(Unreachable, match=told):
                await upstream.infer(call, 0.5)
            await upstream.close()
