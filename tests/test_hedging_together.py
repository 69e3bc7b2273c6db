"""Transports that decide as one, and transports that know where a session's cache is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.hedging import HedgingTransport
from tests.upstream import Reply, Request, Toy

PATIENCE = 15.0
NOWHERE = ["http://127.0.0.1:9"]


class Busy(Toy):
    """A server that knows how many requests it had at once, at most."""

    def __init__(self) -> None:
        super().__init__(lambda _: Reply(self._compute()))
        self.now = self.most = 0

    async def _compute(self) -> AsyncIterator[bytes]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.01)
            yield b"done"
        finally:
            self.now -= 1


@contextlib.asynccontextmanager
async def clients(
    folder: Path | None, count: int, *toys: Toy
) -> AsyncIterator[list[httpx.AsyncClient]]:
    urls = [toy.url for toy in toys]
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=HedgingTransport(urls, slots=1, members=folder),
                    base_url="http://model",
                )
            )
            for _ in range(count)
        ]


async def most_at_once(asking: list[httpx.AsyncClient], *servers: Busy) -> int:
    """Return how many of the clients' requests were at one server."""

    async def ask(client: httpx.AsyncClient) -> None:
        for _ in range(12):
            assert (await client.post("/predict")).text == "done"

    for server in servers:
        server.most = 0
    await asyncio.gather(*map(ask, asking))
    return max(server.most for server in servers)


async def until_one(asking: list[httpx.AsyncClient], *servers: Busy) -> None:
    """Wait until the clients have nowhere two requests at once, as one client would."""
    end = time.monotonic() + PATIENCE
    while await most_at_once(asking, *servers) > 1:
        assert time.monotonic() < end, "they never decide as one"


async def test_transports_with_a_folder_in_common_decide_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "members"
    async with Busy() as a, Busy() as b:
        async with clients(None, 4, a, b) as asking:
            assert await most_at_once(asking, a, b) > 1
        async with clients(folder, 4, a, b) as asking:
            await until_one(asking, a, b)
            await asking[0].aclose()  # the oldest has decided
            await until_one(asking[1:], a, b)
        assert not list(folder.iterdir())


async def test_a_killed_processes_socket_is_taken_away(tmp_path: Path) -> None:
    left = tmp_path / "dead.member"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    async with Busy() as a, clients(tmp_path, 1, a) as (asking,):
        end = time.monotonic() + PATIENCE
        while left.exists():
            assert time.monotonic() < end
            assert (await asking.get("/")).text == "done"


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    (everybodys := tmp_path / "everybodys").mkdir()
    everybodys.chmod(0o777)
    for folder, why in (
        (file / "in it", "Not a directory"),
        (everybodys, "everybody may write"),
        (tmp_path / ("x" * 100), "at most"),
    ):
        with pytest.raises(UserError, match=rf"^members: .*{why}"):
            HedgingTransport(NOWHERE, members=folder)


async def test_a_session_stays_at_the_server_that_has_its_cache() -> None:
    def thinks(_: Request) -> Reply:
        return Reply(b"{}", delay=0.02)

    async with Toy(thinks) as a, Toy(thinks) as b:
        transport = HedgingTransport([a.url, b.url], affinity="x-session")
        async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
            for turn in range(6):
                for session in ("s0", "s1", "s2"):  # an odd number: they'd change servers in turn
                    content = (turn + 1) * 2000 * "x"
                    await client.post("/chat", content=content, headers={"x-session": session})
        seen = [
            {r.fields["x-session"] for r in toy.requests if r.path == "/chat"} for toy in (a, b)
        ]
        assert not seen[0] & seen[1]
    with pytest.raises(UserError, match=r"^affinity: "):
        HedgingTransport(NOWHERE, affinity="no such thing")
