"""What clients without the token can't do to those that have it, nor slow ones to quick ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.gateway.support import INFER, V2, gateway
from tests.observing import until
from tests.upstream import Upstream

MIB = 1 << 20


def post(path: str, length: int) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path.encode(), length)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/codedinvnet", "/metrics", V2])
@pytest.mark.parametrize("is_apart", [False, True])
async def test_no_body_is_read_without_the_token(path: str, is_apart: bool, tmp_path: Path) -> None:
    """Eight bodies of an eighth of the memory each, of which a byte is withheld."""
    (tmp_path / "token").write_text("secret")
    token, port = tmp_path / "token", 0 if is_apart else None
    async with gateway(Upstream(), token_file=token, max_memory=8.0, admin_port=port) as g:
        for url in {g.gateway.url, g.gateway.admin_url}:
            for _ in range(8):
                port = int(url.rpartition(":")[2])
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(post(path, MIB) + bytes(MIB - 1))
                refused = await asyncio.wait_for(reader.readline(), 10.0)
                assert refused[9:12] in (b"401", b"404", b"413")
                writer.transport.abort()
            assert g.gateway.memory.peak < MIB
        found = await g.ask("POST", V2, INFER, authorization="Bearer secret")
        assert found.status == 200


async def test_slow_bodies_keep_nobody_out() -> None:
    """Eight clients stop at 15/16 of the largest body, and then send a byte now and then."""

    async def drip() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
        try:
            writer.write(post("/", MIB) + bytes(15 * MIB // 16))
            while not writer.transport.is_closing():
                await asyncio.sleep(0.2)
                writer.write(b"x")
        finally:
            writer.transport.abort()

    async with gateway(Upstream(), max_memory=8.0) as g:
        slow = [asyncio.create_task(drip()) for _ in range(8)]
        try:
            await until(lambda: g.gateway.memory.is_full)
            statuses = []
            for _ in range(100):
                statuses.append((await g.ask("POST", "/", bytes(MIB // 2))).status)
                if statuses[-1] == 200:
                    break
                await asyncio.sleep(0.2)
            assert (statuses[0], statuses[-1]) == (503, 200)
            assert not g.gateway.memory.is_full
        finally:
            for each in slow:
                each.cancel()
            await asyncio.gather(*slow, return_exceptions=True)


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + 60_000 * b"a", id="head"),
        pytest.param(200 * b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", id="ahead"),
    ],
)
async def test_many_strangers_keep_nobody_out(held: bytes, tmp_path: Path) -> None:
    """Each of 200 clients without the token holds as much as a connection lets it."""

    async def hold() -> asyncio.StreamWriter:
        _, writer = await asyncio.open_connection("127.0.0.1", g.client.origin.port)
        writer.write(held)
        return writer

    (tmp_path / "token").write_text("secret")
    async with gateway(Upstream(), token_file=tmp_path / "token", max_memory=8.0) as g:
        right = {"authorization": "Bearer secret"}
        assert (await g.ask("POST", V2, INFER, **right)).status == 200
        writers = [await hold() for _ in range(200)]
        try:
            for _ in range(50):
                await asyncio.sleep(0.01)
                assert (await g.ask("POST", V2, bytes(MIB // 2), **right)).status == 200
            assert g.gateway.memory.used < MIB
        finally:
            for writer in writers:
                writer.transport.abort()
