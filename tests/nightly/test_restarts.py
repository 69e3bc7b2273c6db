"""Rolling restarts of upstreams and of the gateway, under load and with open streams."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from codedinvnet.net.client import HttpClient, parse_origin
from tests.gateway.support import INFER, Process, process
from tests.gateway.test_activation import CHUNKED, listening, url_of
from tests.processes import needs_proc
from tests.upstream import Request, Upstream, answer

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600), needs_proc]
RATE, STREAMS = 300.0, 50
SECONDS = float(os.environ.get("SECONDS", "60"))
STREAM = 4.0
"""Seconds that a stream takes."""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


class Replica(Upstream):
    """A server that restarts as a good one does: it answers what it has, and then goes."""

    def __init__(self) -> None:
        super().__init__()
        self.handler = self.handle
        self.pending = 0

    async def handle(self, request: Request, writer: asyncio.StreamWriter) -> bytes:
        self.pending += 1
        try:
            if request.path == "/stream":
                writer.write(CHUNKED)
                for _ in range(10):
                    await asyncio.sleep(STREAM / 10)
                    writer.write(b"1\r\ny\r\n")
                return b"0\r\n\r\n"
            await asyncio.sleep(0.005)
            return answer(request.body)
        finally:
            self.pending -= 1

    async def restart(self) -> None:
        self.is_ready = False
        await asyncio.sleep(3.0)  # which the gateway notices
        while self.pending:
            await asyncio.sleep(0.05)
        await self.stop()
        await asyncio.sleep(0.5)
        self.is_ready = True
        await self.start()


async def test_rolling_restarts_lose_nothing() -> None:
    main, found, chance = listening(), Counter[object](), random.Random(0)
    url, loop = parse_origin(url_of(main)), asyncio.get_running_loop()
    until = loop.time() + SECONDS
    replicas = [Replica() for _ in range(3)]

    async def ask(client: HttpClient, method: str, path: str, wanted: bytes) -> None:
        try:
            reply = await client.ask(method, path, 30.0, INFER if method == "POST" else None)
            found[reply.status if reply.body == wanted else reply.body] += 1
        except OSError as error:
            found[repr(error)] += 1

    async def alone(method: str, path: str, wanted: bytes) -> None:
        client = HttpClient(url)
        await ask(client, method, path, wanted)
        client.close()

    async def requests() -> None:
        """Send requests that may be repeated and others, on new connections."""
        asked, due = set[asyncio.Task[None]](), loop.time()
        while due < until:
            path = chance.choice(("/v2/models/m/infer", "/other"))
            asked.add(asyncio.create_task(alone("POST", path, INFER)))
            due += chance.expovariate(RATE)
            await asyncio.sleep(max(0.0, due - loop.time()))
        await asyncio.gather(*asked)

    async def streams() -> None:
        while loop.time() < until:
            await alone("GET", "/stream", b"x" + 10 * b"y")

    async def roll_upstreams() -> None:
        while loop.time() < until - 10.0:
            for replica in replicas:
                await replica.restart()
                await asyncio.sleep(3.0)

    async def roll_gateway(stack: AsyncExitStack) -> None:
        async def start() -> Process:
            more = [word for each in replicas[1:] for word in ("--upstream", each.url)]
            words = (*more, "--log-level", "error")
            made = process(replicas[0], *words, sockets={"gateway.socket": main})
            return await stack.enter_async_context(made)

        first = await start()
        began.set()
        while loop.time() < until - 10.0:
            await asyncio.sleep(5.0)
            second = await start()
            first.process.terminate()
            await first.end()
            first = second
        await asyncio.sleep(max(0.0, until - loop.time()) + STREAM + 1.0)
        first.process.terminate()
        await first.end()

    began = asyncio.Event()
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(replica)
        rolling = asyncio.create_task(roll_gateway(stack))
        await began.wait()
        await asyncio.gather(
            requests(), roll_upstreams(), rolling, *(streams() for _ in range(STREAMS))
        )
    main.close()
    print(dict(found))
    assert set(found) == {200}
    assert found[200] > 0.9 * RATE * SECONDS
