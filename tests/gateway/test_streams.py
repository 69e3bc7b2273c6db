"""Streams: the first content decides, bytes flow as they come, and nothing is ever mixed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from codedinvnet.net import server
from tests.gateway.support import INFER, V2, Running, gateway
from tests.observing import until
from tests.upstream import Handler, Request, saying

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
    async with gateway(saying(bytes(8 << 20), after=1.0)) as g:
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


def failing(*events: bytes) -> Handler:
    """Return a handler whose streams have these events, and then break off."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for event in events:
            writer.write(chunk(event))
            await asyncio.sleep(0.05)

    return serve


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"the engine died","code":500}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
        b'event: response.failed\ndata: {"type":"response.failed","response":{}}\n\n',
    ],
)
async def test_a_stream_that_begins_with_an_error_is_made_up_for(error: bytes) -> None:
    sound, broken = streaming(), failing(b": ping\n\n", error)
    async with gateway(sound, broken, broken, **HEDGED) as g:
        for _ in range(9):
            assert unchunked(await stream(g, "a")) == whole("a")
        assert any(upstream.requests for upstream in g.upstreams[1:])
        assert sum(len(upstream.requests) for upstream in g.upstreams[1:]) < 9  # it was ejected
    async with gateway(broken, **HEDGED) as g:  # without another, the client gets it
        assert error in await stream(g, "a")
    async with gateway(sound, broken) as g:  # what must not be repeated is compared with others
        found = []
        for _ in range(15):
            found += await asyncio.gather(*(stream(g, "a") for _ in range(10)))
        assert sum(error in each for each in found) < 50
        assert g.metric("ejections_total", cause="status") >= 1


STARTED = {
    "openai": token("a", 1),
    "anthropic": b'event: message_start\ndata: {"type":"message_start"}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
    "responses": b'event: response.created\ndata: {"type":"response.created"}\n\n'
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}'
    b"\n\n",
    "": b"data: anything\n\n",
}


@pytest.mark.parametrize("api", STARTED)
async def test_a_stream_that_breaks_off_ends_with_an_error_of_its_api(api: str) -> None:
    begun = STARTED[api]
    async with gateway(failing(begun)) as g:
        found = await stream(g, "a")
    assert not found.endswith(b"0\r\n\r\n")
    assert found.startswith(chunk(begun))
    said = found.removeprefix(chunk(begun)).partition(b"\r\n")[2].removesuffix(b"\r\n")
    if not api:
        assert said == b""
        return
    name, _, data = said.strip().rpartition(b"data: ")
    event = json.loads(data)
    assert name == (b"" if api == "openai" else b"event: error\n")
    assert event.get("error", event)["message"] == "the upstream failed in mid-stream"
    assert event.get("type", "error") == "error"


async def test_half_an_event_is_not_completed_by_another() -> None:
    async with gateway(failing(token("a", 1), b'data: {"choices":[{"del')) as g:
        found = await stream(g, "a")
    assert found.endswith(chunk(b'data: {"choices":[{"del'))
