"""How long the gateway waits, and how much it holds, as its reference says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import running
from tests.clock import Clock
from tests.gateway.support import Running, gateway
from tests.gateway.test_run import make_pair
from tests.observing import until
from tests.upstream import Request, Upstream, answer

GET = b"GET /any HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /any HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
EVENT = b"data: 1\n\n"
MIB = 1 << 20


@pytest.fixture
def anyio_backend() -> str:
    """asyncio's own loop, whose clock can be put forward."""
    return "asyncio"


@asynccontextmanager
async def connected(g: Running) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def says_nothing(reader: asyncio.StreamReader, seconds: float = 0.5) -> bool:
    """Tell whether neither a byte nor the end comes, in real time."""
    coming = asyncio.ensure_future(reader.read(1))
    done, _ = await asyncio.wait([coming], timeout=seconds)
    coming.cancel()
    return not done


@pytest.mark.parametrize(
    ("sent", "limit", "said"),
    [(GET, 10.0, b"HTTP/1.1 408 "), (POST + b"half", 60.0, b"HTTP/1.1 408 "), (b"", 75.0, b"")],
    ids=["head", "body", "idle"],
)
async def test_a_client_that_sends_nothing_more(
    clock: Clock, sent: bytes, limit: float, said: bytes
) -> None:
    async with gateway(Upstream()) as g, connected(g) as (reader, writer):
        writer.write(sent)
        await until(lambda: bool(g.connections))
        assert await says_nothing(reader)  # what was sent is read
        clock.forward(limit - 3.0)
        assert await says_nothing(reader)
        clock.forward(4.0)
        found = await asyncio.wait_for(reader.read(), 20.0)
        assert found[:13] == said
        await until(lambda: g.gateway.memory.used == 0)


async def test_a_client_that_sends_its_body_byte_by_byte(clock: Clock) -> None:
    async with gateway(Upstream()) as g, connected(g) as (reader, writer):
        writer.write(POST.replace(b": 9", b": 99999") + bytes(1 << 16))
        await until(lambda: g.gateway.memory.used > 1 << 15)
        for _ in range(2):
            clock.forward(28.0)
            writer.write(b"x")
            assert await says_nothing(reader)
        clock.forward(5.0)
        writer.write(b"x")
        assert (await asyncio.wait_for(reader.read(), 20.0))[:13] == b"HTTP/1.1 408 "


async def test_a_handshake_that_never_ends(clock: Clock, tmp_path: Path) -> None:
    async with gateway(Upstream(), **make_pair(tmp_path)) as g, connected(g) as (reader, _):
        assert await says_nothing(reader)
        clock.forward(8.0)
        assert await says_nothing(reader)
        clock.forward(3.0)
        assert await asyncio.wait_for(reader.read(), 20.0) == b""


async def test_a_client_that_does_not_read(clock: Clock) -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return answer(bytes(32 * MIB))

    async with gateway(serve) as g, connected(g) as (_, writer):
        writer.transport.pause_reading()
        writer.write(GET + b"\r\n")
        await until(lambda: g.metric("request_seconds_count") == 1)
        await asyncio.sleep(1.5)  # it is noted that its client takes nothing
        clock.forward(50.0)
        await asyncio.sleep(1.5)
        assert g.connections
        clock.forward(12.0)
        await until(lambda: not g.connections, 20.0)


async def test_a_stream_that_stands_still(clock: Clock) -> None:
    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n9\r\n" + EVENT + b"\r\n")
        await asyncio.sleep(1e6)
        return b""

    async with gateway(serve) as g, connected(g) as (reader, writer):
        writer.write(GET + b"\r\n")
        await reader.readuntil(EVENT + b"\r\n")
        clock.forward(295.0)
        assert await says_nothing(reader, 1.0)
        clock.forward(6.0)
        assert await asyncio.wait_for(reader.read(), 20.0) == b""  # without a last chunk
        assert g.metric("requests_total", outcome="aborted") == 1


async def test_what_must_not_be_repeated_gets_no_connection_that_may_be_closing(
    clock: Clock,
) -> None:
    """The upstream may close a connection that was idle for long as the request arrives."""
    async with gateway(Upstream()) as g:
        (upstream,) = g.upstreams
        await g.ask("GET")
        writers = set(upstream.writers)
        clock.forward(0.5)
        await g.ask("POST", "/orders", b"x")
        assert upstream.writers == writers
        clock.forward(1.5)
        await g.ask("POST", "/orders", b"x")
        assert upstream.writers > writers


async def test_bodies_that_come_together_hold_no_more_than_the_bound() -> None:
    """Each had room when it began."""
    head = b"POST /any HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % MIB
    async with gateway(Upstream(), max_memory=8.0) as g, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(g)) for _ in range(16)]
        for _, writer in clients:
            writer.write(head + b"a")
        await until(lambda: g.gateway.memory.used == 16)
        for _, writer in clients:
            writer.write(bytes(MIB - 2))
        first = [asyncio.ensure_future(reader.readuntil(b"\r\n")) for reader, _ in clients]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        await until(lambda: sum(one.done() for one in first) >= 8)
        assert {one.result()[9:12] for one in first if one.done()} == {b"503"}
        assert g.gateway.memory.peak <= 9 * MIB
        for one in first:
            one.cancel()


async def test_trailers_have_a_limit() -> None:
    head = b"POST /any HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    async with gateway(Upstream()) as g:
        found = await g.raw(head + b"A: b\r\n" * 20_000, closes=False)
        assert found.startswith(b"HTTP/1.1 431 ")
        assert g.upstreams[0].requests == []


# gRPC


async def test_a_call_whose_message_does_not_come(clock: Clock) -> None:
    grpc = pytest.importorskip("grpc")
    from tests.gateway import test_grpc as over_grpc

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(1e6)
        yield b""

    async with over_grpc.Upstream() as one, over_grpc.gateway(one) as channel:
        call = channel.stream_unary(over_grpc.ECHO)(nothing())
        await asyncio.sleep(0.5)
        clock.forward(61.0)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(call, 20.0)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_messages_over_grpc_count_in_the_bound_of_memory() -> None:
    grpc = pytest.importorskip("grpc")
    from tests.gateway import test_grpc as over_grpc

    go = asyncio.Event()

    async def hold(message: bytes, context: Any) -> bytes:
        await go.wait()
        return b""

    async with over_grpc.Upstream() as one:
        one.answer = hold
        urls = (f"grpc://127.0.0.1:{one.port}",)
        options = GatewayOptions(upstream=urls, port=0, grpc_port=0, max_memory=8.0, slots=16)
        async with running(options) as found:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{found.grpc_port}") as channel:
                send = channel.unary_unary(over_grpc.INFER)
                ended = []
                for _ in range(20):
                    call = send(bytes(MIB))
                    ended.append(asyncio.ensure_future(call.code()))
                    await asyncio.wait(ended[-1:], timeout=0.05)
                go.set()
                codes = await asyncio.gather(*ended)
            assert codes.count(grpc.StatusCode.OK) >= 5
            assert codes.count(grpc.StatusCode.UNAVAILABLE) >= 5
            assert found.memory.peak <= 8 * MIB + 2 * MIB
            assert found.memory.used == 0


async def test_calls_without_a_message_hold_up_no_other() -> None:
    """Nor do they take more memory than half of it."""
    pytest.importorskip("grpc")
    from tests.gateway import test_grpc as over_grpc

    async with over_grpc.Upstream() as one, over_grpc.gateway(one) as channel:
        empty = [channel.stream_unary(over_grpc.ECHO)() for _ in range(200)]
        await asyncio.gather(*(call.wait_for_connection() for call in empty))
        for _ in range(3):
            assert await channel.unary_unary(over_grpc.INFER)(b"x", timeout=5.0) == b"x"
        assert not all(call.done() for call in empty)
        for call in empty:
            call.cancel()


async def test_answers_over_grpc_count_in_the_bound_of_memory() -> None:
    grpc = pytest.importorskip("grpc")
    from tests.gateway import test_grpc as over_grpc

    async def long(message: bytes, context: Any) -> bytes:
        return bytes(3 * MIB)

    async with over_grpc.Upstream() as one:
        one.answer = long
        urls = (f"grpc://127.0.0.1:{one.port}",)
        options = GatewayOptions(upstream=urls, port=0, grpc_port=0, max_memory=8.0)
        async with (
            running(options) as found,
            grpc.aio.insecure_channel(
                f"127.0.0.1:{found.grpc_port}", [("grpc.max_receive_message_length", -1)]
            ) as channel,
        ):
            assert len(await channel.unary_unary(over_grpc.INFER)(b"x")) == 3 * MIB
            assert found.memory.peak >= 3 * MIB
            await until(lambda: found.memory.used == 0)
