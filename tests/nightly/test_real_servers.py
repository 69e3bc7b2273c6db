"""Two replicas of real, unchanged servers: one is stopped, the other killed, and nobody notices."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import httpx
import pytest

from codedinvnet.common.processes import free_port, running
from codedinvnet.hedging import HedgingTransport
from tests.nightly.servers import (
    FastAPI,
    LitServe,
    MLServer,
    RayServe,
    Replica,
    Transformers,
    TritonServer,
)

KINDS: list[type[Replica]] = [FastAPI, LitServe, RayServe, MLServer, TritonServer, Transformers]
CLIENTS = 4
WAIT = 30.0
"""Seconds that a client waits: longer than any fault, whatever else the machine does."""


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def replicas(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Replica]]:
    kind: type[Replica] = request.param
    if not kind.needs.exists():
        pytest.skip(f"{kind.__name__} is not installed: see tools/")
    folder = tmp_path_factory.mktemp(kind.__name__)
    with ExitStack() as stack:
        found = [kind(folder / name) for name in "ab"]
        for replica in found:
            stack.callback(replica.kill)
            replica.start()
            replica.wait()
        yield found


@asynccontextmanager
async def client(front: str, replicas: Sequence[Replica]) -> AsyncIterator[httpx.AsyncClient]:
    urls, kind = [replica.url for replica in replicas], replicas[0]
    if front == "transport":
        transport = HedgingTransport(urls, hedge=[f"POST {kind.path}"])
        async with httpx.AsyncClient(
            transport=transport, base_url="http://model", timeout=WAIT
        ) as found:
            yield found
        return
    command = [sys.executable, "-m", "codedinvnet", "gateway", "--port", str(free_port())]
    for url in urls:
        command += ["--upstream", url]
    command += ["--hedge", f"POST {kind.path}", "--health", kind.health]
    command += ["--deadline-ms", str(1000 * WAIT)]
    with running(*command, log=kind.folder.parent / "gateway.log") as gateway:
        async with httpx.AsyncClient(base_url=gateway.address, timeout=WAIT) as found:
            yield found


async def load(asking: httpx.AsyncClient, kind: Replica, over: asyncio.Event) -> Counter[str]:
    """Send requests until it is over; count what became of them."""
    told: Counter[str] = Counter()

    async def some(first: int) -> None:
        number = first
        while not over.is_set():
            number += CLIENTS
            try:
                reply = await asking.post(
                    kind.path, content=kind.body(number), headers=kind.headers
                )
            except httpx.HTTPError as error:
                told[f"{type(error).__name__}: {error}"] += 1
                continue
            if reply.status_code != 200:
                told[f"{reply.status_code}: {reply.text[:200]}"] += 1
            else:
                told["right" if kind.is_right(number, reply.content) else "wrong"] += 1
            await asyncio.sleep(0.02)

    await asyncio.gather(*(some(i) for i in range(CLIENTS)))
    return told


@pytest.mark.parametrize("front", ["gateway", "transport"])
async def test_a_stop_and_a_kill_lose_nothing(front: str, replicas: list[Replica]) -> None:
    first, second = replicas
    over = asyncio.Event()
    async with client(front, replicas) as asking:
        loading = asyncio.create_task(load(asking, first, over))
        try:
            await asyncio.sleep(3)
            first.signal(signal.SIGSTOP)
            await asyncio.sleep(3)
            first.signal(signal.SIGCONT)
            await asyncio.sleep(2)
            second.kill()
            await asyncio.sleep(3)
            second.start()
            await asyncio.to_thread(second.wait)
            await asyncio.sleep(2)
        finally:
            over.set()
        told = await loading
    print(front, type(first).__name__, dict(told))
    cut = sum(told.values()) - told["right"]  # streams that had begun where the server was killed
    assert told["wrong"] == 0
    assert cut <= (CLIENTS if first.streams else 0)
    assert told["right"] > 100
