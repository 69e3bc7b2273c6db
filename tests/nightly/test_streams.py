"""Streams through the gateway: a slow upstream and stalls cost little, and no stream is damaged."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from codedinvnet.processes import running
from tests.toys import Handler, Reply, Request, Toy

STREAMS = int(os.environ.get("STREAMS", "20000"))
RATE = 60.0
"""Streams that begin in a second."""
FIRST, TOKENS, GAP = 0.08, 5, 0.002
"""Seconds to the first token, tokens, and seconds between two."""
END = b"0\r\n\r\n"


def upstream(name: str, slowness: float = 1.0, stalled: float = 0.0) -> Handler:
    """Answer with a role, as servers of chats do at once, and then with numbered tokens."""
    rng = random.Random(name)

    async def tokens(number: str) -> AsyncIterator[bytes]:
        yield b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
        stall = 3.0 if rng.random() < stalled else 0.0
        await asyncio.sleep(FIRST * slowness * rng.uniform(0.9, 1.1) + stall)
        for i in range(TOKENS):
            text = f"{name}/{number}/{i} "
            yield b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % text.encode()
            await asyncio.sleep(GAP)

    def handle(request: Request) -> Reply:
        return Reply(tokens(request.body.decode()), type="text/event-stream")

    return handle


class Client:
    """Reads streams on kept connections; returns the seconds to the first token."""

    def __init__(self) -> None:
        self.idle: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}
        self.damaged: list[bytes] = []

    async def stream(self, url: str, number: int) -> float:
        host, port = urlsplit(url).netloc.split(":")
        kept = self.idle.setdefault(url, [])
        began = asyncio.get_running_loop().time()
        reader, writer = kept.pop() if kept else await asyncio.open_connection(host, int(port))
        body = b"%d" % number
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        writer.write((head % len(body)).encode() + body)
        got, first = b"", 0.0
        while not got.endswith(END) and (data := await reader.read(1 << 16)):
            got += data
            if not first and b'"content"' in got:
                first = asyncio.get_running_loop().time() - began
        kept.append((reader, writer))
        words = [part.split(b" ")[0] for part in got.split(b'"content": "')[1:]]
        name = words[0].split(b"/")[0] if words else b""
        if words != [b"%b/%d/%d" % (name, number, i) for i in range(TOKENS)]:
            self.damaged.append(got)
        return first

    async def load(self, urls: Sequence[str], streams: int) -> np.ndarray:
        """Begin streams at random times, at each URL in turn."""
        rng, loop = random.Random(0), asyncio.get_running_loop()
        at, tasks = loop.time(), []
        for number in range(streams):
            at += rng.expovariate(RATE)
            await asyncio.sleep(max(0.0, at - loop.time()))
            tasks.append(asyncio.create_task(self.stream(urls[number % len(urls)], number)))
        return np.array(await asyncio.gather(*tasks))

    def close(self) -> None:
        for _, writer in (each for kept in self.idle.values() for each in kept):
            writer.close()


async def measure(handlers: Sequence[Handler], streams: int, log: Path) -> tuple[float, ...]:
    """Return p50 and p99 through a gateway, p99 of round robin, and requests for each stream."""
    async with AsyncExitStack() as stack:
        toys = [await stack.enter_async_context(Toy(handler)) for handler in handlers]
        client = Client()
        stack.callback(client.close)
        urls = [toy.url for toy in toys]
        direct = await client.load(urls, streams // 4)
        for toy in toys:
            toy.seen.clear()
        command = [sys.executable, "-m", "codedinvnet", "gateway", "--port", "0"]
        command += [word for url in urls for word in ("--upstream", url)]
        command += ["--hedge", "POST /v1/chat/completions"]
        with ExitStack() as processes:
            starting = running(*command, log=log)
            gateway = await asyncio.to_thread(processes.enter_context, starting)
            await client.load([gateway.address], 200)  # until the delay is known
            times = await client.load([gateway.address], streams)
            started = sum(each.path.startswith("/v1") for toy in toys for each in toy.seen)
        assert not client.damaged
        p50, p99 = np.quantile(times, (0.5, 0.99))
        found = p50, p99, np.quantile(direct, 0.99), started / (streams + 200)
        print([round(float(each), 3) for each in found])
        return found


@pytest.mark.timeout(3600)
async def test_an_upstream_that_is_slow_to_its_first_token(tmp_path: Path) -> None:
    handlers = [upstream("a"), upstream("b"), upstream("c"), upstream("d", slowness=4.0)]
    _, p99, round_robin, started = await measure(handlers, STREAMS, tmp_path / "log")
    assert p99 <= round_robin / 2
    assert started <= 1.1


@pytest.mark.timeout(3600)
async def test_requests_that_stall_before_their_first_token(tmp_path: Path) -> None:
    handlers = [upstream(name, stalled=0.02) for name in "abcd"]
    p50, p99, _, started = await measure(handlers, STREAMS // 4, tmp_path / "log")
    assert p50 < 0.1
    assert p99 < 0.3
    assert started <= 1.1
