"""The gateway at length: no repeats, whole streams, and hedging that feeds back on itself."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.gateway.support import gateway
from tests.gateway.test_hedging import unrepeated
from tests.gateway.test_streams import HEAD, ROLE, chunk, token, unchunked, whole
from tests.upstream import Handler, Request, Upstream

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
STREAMS, TOKENS, SAFE = int(os.environ.get("STREAMS", "20000")), 3, 20_000
WARM_UP = 200
"""Streams before those that are measured."""
HEDGED = ("POST /chat",)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


async def test_no_request_that_must_not_be_repeated_reaches_two_upstreams() -> None:
    await unrepeated(SAFE, random.Random(0))


def quantile(times: list[float], share: float) -> float:
    return sorted(times)[int(share * len(times))]


async def poisson(
    rate: float, count: int, ask: Callable[[int], Awaitable[float]], seed: int = 0
) -> list[float]:
    """Return the times of requests that come at random, whatever becomes of those before."""
    chance, tasks, due = random.Random(seed), [], time.monotonic()
    for number in range(count):
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.ensure_future(ask(number)))
    return list(await asyncio.gather(*tasks))


def tokens(first: Callable[[], float]) -> Handler:
    """Return a handler that says who it is; headers and a role come before the first token."""
    names.append(name := f"upstream{len(names)}")

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD + chunk(b": ping\n\n") + chunk(ROLE))
        await asyncio.sleep(first())
        for number in range(TOKENS):
            writer.write(chunk(token(f"{name}/{request.body.decode()}", number)))
            await asyncio.sleep(0.002)
        return b"0\r\n\r\n"

    return serve


names: list[str] = []


async def streamed(handlers: list[Handler], count: int, rate: float) -> tuple[list[float], float]:
    """Return the times to the first content, and how many requests were sent for each stream."""
    async with gateway(*handlers, slots=16, hedge=HEDGED) as g:

        async def ask(number: int) -> float:
            port, body = g.client.origin.port, f"n{number}"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            began = time.monotonic()
            writer.write(
                f"POST /chat HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            seconds = time.monotonic() - began
            data = await reader.read()
            writer.close()
            assert unchunked(data) in {whole(f"{name}/{body}", TOKENS) for name in names}
            return seconds

        await poisson(rate, WARM_UP, ask, seed=1)
        times = await poisson(rate, count, ask)
        assert g.metric("requests_total", outcome="aborted") == 0
        sent = sum(len(upstream.requests) for upstream in g.upstreams)
        return times, sent / (count + WARM_UP)


async def round_robin(handlers: list[Handler], count: int, rate: float) -> list[float]:
    """Return the times to the first content if each upstream gets its turn."""
    upstreams = [Upstream(handler) for handler in handlers]
    for upstream in upstreams:
        await upstream.start()

    async def ask(number: int) -> float:
        port = upstreams[number % len(upstreams)].port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(b"POST /chat HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
        await reader.readuntil(b'content":"up')
        seconds = time.monotonic() - began
        writer.close()
        return seconds

    times = await poisson(rate, count, ask)
    for upstream in upstreams:
        await upstream.stop()
    return times


async def test_streams_with_one_slow_upstream() -> None:
    chance = random.Random(0)
    fast = [tokens(lambda: 0.05 * chance.uniform(0.8, 1.2)) for _ in range(3)]
    handlers = [*fast, tokens(lambda: 0.2 * chance.uniform(0.8, 1.2))]
    usual = await round_robin(handlers, STREAMS // 10, 100.0)
    times, sent = await streamed(handlers, STREAMS, 100.0)

    assert quantile(times, 0.99) <= quantile(usual, 0.99) / 2
    assert sent <= 1.1


async def test_streams_of_which_some_stall() -> None:
    chance = random.Random(0)

    def first() -> float:
        return 3.0 if chance.random() < 0.02 else 0.08 * chance.uniform(0.9, 1.1)

    times, sent = await streamed([tokens(first) for _ in range(4)], STREAMS // 4, 50.0)

    assert quantile(times, 0.5) < 0.1
    assert quantile(times, 0.99) < 0.3
    assert sent <= 1.1
