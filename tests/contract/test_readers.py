"""Clients over gRPC that open calls and read no answer keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import RunningGateway, running
from tests.clock import Clock
from tests.observing import until

grpc = pytest.importorskip("grpc")
from tests.gateway.test_grpc import INFER, Upstream  # noqa: E402

MIB = 1 << 20
HEALTH = "/grpc.health.v1.Health/Check"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, DATA, SETTINGS = b"\x01\x04", b"\x00\x01", b"\x04\x00"
"""Kinds of frames, with the flags of one that is whole."""
NO_WINDOW = b"\x00\x04" + bytes(4)


@pytest.fixture
def anyio_backend() -> str:
    """asyncio's own loop, whose clock can be put forward."""
    return "asyncio"


def frame(kind: bytes, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + kind + stream.to_bytes(4, "big") + payload


def call(number: int, method: str, message: bytes = b"") -> bytes:
    """Return the frames of a call."""
    fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "a"}
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    plain = (b"\x00%c%b%c%b" % (len(k), k.encode(), len(v), v.encode()) for k, v in fields.items())
    data = b"\x00" + len(message).to_bytes(4, "big") + message
    stream = 2 * number + 1
    return frame(HEADERS, stream, b"".join(plain)) + frame(DATA, stream, data)


@asynccontextmanager
async def unread(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    """Connect as a client that has no room for an answer, and reads none."""
    writer: Any
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.transport.pause_reading()
    writer.write(PREFACE + frame(SETTINGS, 0, NO_WINDOW))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@asynccontextmanager
async def gateway(answer: int, **options: Any) -> AsyncIterator[tuple[RunningGateway, Any]]:
    """Run a gateway, and yield it with a channel; the upstream's answers have so many bytes."""

    async def long(message: bytes, context: Any) -> bytes:
        return bytes(answer)

    async with Upstream() as one:
        one.answer = long
        urls = (f"grpc://127.0.0.1:{one.port}",)
        given = GatewayOptions(upstream=urls, port=0, grpc_port=0, max_memory=8.0, **options)
        settings = [("grpc.max_receive_message_length", -1)]
        async with (
            running(given) as found,
            grpc.aio.insecure_channel(f"127.0.0.1:{found.grpc_port}", settings) as channel,
        ):
            yield found, channel


@pytest.mark.parametrize("count", [150, 2000])
async def test_strangers_take_no_call_from_those_with_the_token(count: int, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    async with gateway(1, token_file=tmp_path / "token") as (found, channel):
        assert found.grpc_port is not None
        async with unread(found.grpc_port) as (reader, writer):
            for number in range(count):
                writer.write(call(number, HEALTH))
            await asyncio.sleep(0.5)
            right = (("authorization", "Bearer secret"),)
            infer = channel.unary_unary(INFER)
            assert await infer(b"x", metadata=right, timeout=20) == b"\x00"
            assert await channel.unary_unary(HEALTH)(b"", timeout=20) == b"\x08\x01"
            writer.transport.resume_reading()
            with contextlib.suppress(ConnectionError):  # it is closed
                await asyncio.wait_for(reader.read(), 20)


async def test_unread_answers_do_not_keep_the_memory(clock: Clock) -> None:
    async with gateway(MIB) as (found, channel):
        assert found.grpc_port is not None
        async with unread(found.grpc_port) as (_, writer):
            for number in range(200):
                writer.write(call(number, INFER, b"x"))
                await asyncio.sleep(0.002)
            await until(lambda: found.memory.is_full)
            refused = await channel.unary_unary(INFER)(b"x", timeout=20).code()
            assert refused is grpc.StatusCode.UNAVAILABLE
            await asyncio.sleep(1.5)
            assert found.memory.is_full  # clients have some seconds
            clock.forward(11.0)
            await until(lambda: not found.memory.used)
            assert len(await channel.unary_unary(INFER)(b"x", timeout=20)) == MIB
