"""Streams: the first content decides, bytes flow as they come, and nothing is ever mixed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from codedinvnet.net import server
from tests.gateway.support import INFER, V2, Running, gateway
from tests.observing import until
from tests.upstream import Handler, Request, answer

pytestmark = pytest.mark.anyio
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
PATH = "/chat"
HEDGED: dict[str, Any] = {"route": ("POST /chat hedge=on",)}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(name: str, number: int) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%b %d "}}]}\n\n' % (name.encode(), number)


def streaming(first: float = 0.01, tokens: int = 5, gap: float = 0.001) -> Handler:
    """Return a handler that streams tokens; headers, a comment and a role come at once."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        name = request.body.decode()
        writer.write(HEAD + chunk(b": ping\n\n") + chunk(ROLE))
        await asyncio.sleep(first)
        for number in range(tokens):
            writer.write(chunk(token(name, number)))
            await asyncio.sleep(gap)
        return b"0\r\n\r\n"

    return serve


async def stream(g: Running, name: str) -> bytes:
    """Return a stream's body."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(name)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + name.encode())
        start = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in start, start
        return await reader.read()
    finally:
        writer.close()


def whole(name: str, tokens: int = 5) -> bytes:
    parts = [b": ping\n\n", ROLE, *(token(name, number) for number in range(tokens))]
    return b"".join(parts)


def unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        found, data = found + data[: int(size, 16)], data[int(size, 16) + 2 :]
        if int(size, 16) == 0:
            return found
    raise AssertionError("the stream was cut")


async def test_the_first_content_decides_and_the_loser_is_closed() -> None:
    """The loser has sent its head, a comment and a role, and never sends more than comments."""
    closed, stalls = asyncio.Event(), list[bool]()

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if stalls and stalls.pop():
            writer.write(HEAD + chunk(ROLE))
            try:
                while True:
                    writer.write(chunk(b": still\n\n"))
                    await writer.drain()
                    await asyncio.sleep(0.01)
            except (ConnectionError, RuntimeError):
                closed.set()
                raise
        return await normal(request, writer) or b""

    normal = streaming()
    async with gateway(serve, serve, **HEDGED) as g:
        for number in range(60):
            await stream(g, str(number))
        stalls.append(True)
        assert unchunked(await stream(g, "x")) == whole("x")
        await asyncio.wait_for(closed.wait(), 10.0)
        assert g.metric("hedges_total", result="won") >= 1
        await until(lambda: g.gateway.memory.used == 0)


async def test_streams_are_never_mixed_cut_or_repeated() -> None:
    async with gateway(streaming(), streaming(), streaming(), streaming(0.04), **HEDGED) as g:
        for begin in range(0, 400, 8):
            names = [f"n{number}" for number in range(begin, begin + 8)]
            for name, data in zip(
                names, await asyncio.gather(*(stream(g, name) for name in names)), strict=True
            ):
                assert unchunked(data) == whole(name)
        assert g.metric("requests_total", outcome="aborted") == 0


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_upstream_that_fails_in_mid_stream(version: str) -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"first"))
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with gateway(serve, policy="uncoded") as g:
        request = f"GET / HTTP/{version}\r\nHost: a\r\n\r\n".encode()
        if version == "1.0":
            with pytest.raises(ConnectionResetError):
                await g.raw(request, closes=False)
        else:
            found = await g.raw(request, closes=False)
            assert found.endswith(chunk(b"first"))
        assert g.metric("requests_total", outcome="aborted") == 1
        assert g.metric("attempts_total", result="broken") == 1


async def test_a_long_answer_that_is_held_for_a_while_comes_whole() -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(1.0)
        return answer(bytes(8 << 20))

    async with gateway(serve) as g:
        assert (await g.ask("POST", V2, INFER)).body == bytes(8 << 20)


async def test_a_slow_reader_is_waited_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    size, sent = 64 << 20, 0
    monkeypatch.setattr(server, "UNREAD", 0.5)
    monkeypatch.setattr(server, "SWEEP", 0.1)

    async def serve(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    async with gateway(serve) as g:
        port = g.client.origin.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 14)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readexactly(1000)
        await asyncio.sleep(0.3)
        assert g.gateway.memory.used < 2 << 20
        assert sent < size / 2
        rest = await asyncio.wait_for(reader.read(1 << 20), 5.0)
        assert rest
        await until(lambda: g.metric("requests_total", outcome="cancelled") == 1, 5.0)
        await until(lambda: g.gateway.memory.used == 0)
        writer.close()


async def test_a_stream_ends_whole_though_the_gateway_stops_meanwhile() -> None:
    """Draining has a limit of its own: a deadline is for first content."""
    async with gateway(streaming(tokens=40, gap=0.05), deadline_ms=300.0, **HEDGED) as g:
        reading = asyncio.create_task(stream(g, "me"))
        await until(lambda: len(g.upstreams[0].requests) == 1)
        await asyncio.sleep(0.1)
    assert unchunked(await reading) == whole("me", 40)
    async with gateway(streaming(tokens=400, gap=0.05), drain_ms=200.0, **HEDGED) as g:
        reading = asyncio.create_task(stream(g, "me"))
        await until(lambda: len(g.upstreams[0].requests) == 1)
        await asyncio.sleep(0.1)
    with pytest.raises((AssertionError, ConnectionError)):
        unchunked(await reading)
