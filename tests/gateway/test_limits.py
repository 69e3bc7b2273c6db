"""What requests may hold and how long they may take: memory, deadlines, overload."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from tests.gateway.support import INFER, V2, gateway
from tests.observing import until
from tests.upstream import Request, answer, saying

MIB = 1 << 20


async def test_mute_upstreams_hold_no_more_than_the_bound() -> None:
    """Bodies of abandoned attempts count until these have ended."""
    options: dict[str, Any] = {"max_memory": 8.0, "deadline_ms": 600.0, "slots": 16}
    async with gateway(*[saying(after=60.0)] * 3, **options) as g:
        body, memory = bytes(MIB - 1000), g.gateway.memory

        async def ask() -> int:
            return (await g.ask("POST", V2, body)).status

        found = [status for _ in range(4) for status in await gathered(ask, 20)]
        assert set(found) == {503, 504}
        assert found.count(504) >= 7
        assert memory.peak <= 1.1 * memory.most + MIB
        await until(lambda: memory.used == 0)
        assert (await g.ask("GET", "/livez")).status == 200


async def gathered(ask: Callable[[], Awaitable[int]], count: int) -> list[int]:
    return await asyncio.gather(*(ask() for _ in range(count)))


async def test_slow_readers_and_mute_upstreams_hold_no_more_than_the_bound() -> None:
    """A part that waits counts until all of it is sent: the event loop keeps it until then."""
    size = 10 * MIB

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if request.body:
            await asyncio.sleep(60.0)
        return answer(bytes(size))

    async with AsyncExitStack() as stack:
        g = await stack.enter_async_context(gateway(serve, serve, max_memory=64.0, slots=64))
        memory, clients = g.gateway.memory, []
        mute = [asyncio.create_task(g.ask("POST", V2, bytes(MIB))) for _ in range(50)]
        await until(lambda: memory.used >= 50 * MIB, 10.0)
        for _ in range(60):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", g.client.origin.port, limit=1 << 12
            )
            stack.callback(writer.transport.abort)  # else the event loop would never end
            writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            clients.append((reader, writer))
        await until(lambda: memory.used > 52 * MIB, 10.0)
        await asyncio.sleep(0.5)
        assert memory.peak <= 1.1 * memory.most
        reader, _ = clients[0]
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"200" in head.partition(b"\r\n")[0]
        assert len(await reader.readexactly(size)) == size
        for _, writer in clients:
            writer.transport.abort()
        for one in mute:
            one.cancel()
        await until(lambda: memory.used == 0, 10.0)


async def test_a_full_gateway_says_when_to_come_back() -> None:
    go = asyncio.Event()

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await go.wait()
        return answer(b"ok")

    async with gateway(serve, max_memory=8.0, slots=16) as g:
        held = [asyncio.create_task(g.ask("POST", V2, bytes(MIB - 1))) for _ in range(9)]
        await until(lambda: g.gateway.memory.peak > 7 * MIB)
        await until(lambda: any(one.done() for one in held) or g.gateway.memory.is_full)
        extra = [asyncio.create_task(g.ask("POST", V2, bytes(MIB - 1))) for _ in range(3)]
        done, _ = await asyncio.wait(extra, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert refused.status == 503
        assert refused.field("retry-after") == "1"
        go.set()
        statuses = [(await one).status for one in held]
        assert statuses.count(200) >= 7
        assert (await g.ask("POST", V2, INFER)).status == 200


async def test_an_overload_is_refused_and_not_queued_beyond_the_deadline() -> None:
    async with gateway(saying(after=0.1), slots=1, deadline_ms=1000.0) as g:

        async def ask() -> int:
            return (await g.ask("POST", V2, INFER)).status

        found = await gathered(ask, 60)
        assert found.count(200) >= 2
        assert found.count(429) >= 30
        assert set(found) <= {200, 429, 504}


async def test_a_deadline_says_where_the_request_was() -> None:
    async with gateway(saying(after=5.0), deadline_ms=200.0) as g:
        for path in (V2, "/other"):
            found = await g.ask("POST", path, INFER)
            assert found.status == 504
            assert g.upstreams[0].url.encode() in found.body
        assert g.metric("requests_total", outcome="deadline") == 2
