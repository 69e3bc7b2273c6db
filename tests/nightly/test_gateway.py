"""The gateway at length: no repeats, whole streams, and hedging that feeds back on itself."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from tests.gateway.support import INFER, V2, Handler, Request, Upstream, answer, gateway
from tests.gateway.test_hedging import unrepeated
from tests.gateway.test_streams import HEAD, ROLE, chunk, stream, token, unchunked, whole

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]
STREAMS, SAFE = 20_000, 20_000
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


def tokens(first: Callable[[], float], count: int = 3) -> Handler:
    """Return a handler whose first token takes some time; headers and a role come at once."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD + chunk(b": ping\n\n") + chunk(ROLE))
        await asyncio.sleep(first())
        for number in range(count):
            writer.write(chunk(token(request.body.decode(), number)))
        return b"0\r\n\r\n"

    return serve


async def streamed(
    handlers: list[Handler], policy: str, count: int, rate: float
) -> tuple[list[float], int]:
    """Return the times to the first content, and how many requests upstreams were sent."""
    async with gateway(*handlers, policy=policy, slots=16, hedge=HEDGED) as g:

        async def ask(number: int) -> float:
            name = f"n{number}"
            data, seconds = await stream(g, name)
            assert unchunked(data) == whole(name, 3)
            return seconds

        times = await poisson(rate, count, ask)
        assert g.metric("requests_total", outcome="aborted") == 0
        return times, sum(len(upstream.requests) for upstream in g.upstreams)


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
        await reader.readuntil(b'content":"x ')
        seconds = time.monotonic() - began
        writer.close()
        return seconds

    times = await poisson(rate, count, ask)
    for upstream in upstreams:
        await upstream.stop()
    return times


@pytest.mark.parametrize("count", [STREAMS])
async def test_streams_with_one_slow_upstream(count: int) -> None:
    chance = random.Random(0)
    fast = tokens(lambda: 0.05 * chance.uniform(0.8, 1.2))
    slow = tokens(lambda: 0.2 * chance.uniform(0.8, 1.2))
    handlers = [fast, fast, fast, slow]
    usual = await round_robin(handlers, 2000, 100.0)
    times, sent = await streamed(handlers, "hedge", count, 100.0)

    assert quantile(times, 0.99) <= quantile(usual, 0.99) / 2
    assert sent <= 1.1 * count + 10


async def test_streams_of_which_some_stall() -> None:
    chance = random.Random(0)
    handler = tokens(lambda: 3.0 if chance.random() < 0.02 else 0.08 * chance.uniform(0.9, 1.1))
    times, _ = await streamed([handler] * 4, "hedge", 3000, 50.0)

    assert quantile(times, 0.5) < 0.12
    assert quantile(times, 0.99) < 0.3


class Server:
    """A server that computes one request at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._turn = seconds, asyncio.Lock()

    async def __call__(self, request: Request, writer: asyncio.StreamWriter) -> bytes:
        async with self._turn:
            await asyncio.sleep(self.seconds * random.uniform(0.9, 1.1))
        return answer(request.body)


async def loaded(seconds: list[float], policy: str, rate: float, count: int) -> list[float]:
    async with gateway(*map(Server, seconds), policy=policy, slots=2) as g:

        async def ask(number: int) -> float:
            began = time.monotonic()
            statuses[(await g.ask("POST", V2, INFER)).status] += 1
            return time.monotonic() - began

        statuses: Counter[int] = Counter()
        times = await poisson(rate, count, ask)
        assert set(statuses) == {200}
        return times[count // 5 :]


async def test_one_upstream_that_is_slow_for_good_brings_no_collapse() -> None:
    """ScyllaDB #7342: its times drag the delay up, copies come late, and the rest is overloaded."""
    healthy = 2 / 0.02
    times = await loaded([0.02, 0.02, 0.2], "hedge", 0.9 * healthy, 3000)

    assert quantile(times, 0.5) < 0.4
    assert quantile(times, 0.99) < 1.5


async def test_when_all_upstreams_are_slow_hedging_costs_little() -> None:
    """All become ten times as slow at once: copies would only add to the load."""

    async def run(policy: str) -> list[float]:
        servers = [Server(0.02) for _ in range(3)]
        async with gateway(*servers, policy=policy, slots=2) as g:

            async def ask(number: int) -> float:
                if number == 1000:
                    for server in servers:
                        server.seconds = 0.06
                began = time.monotonic()
                assert (await g.ask("POST", V2, INFER)).status == 200
                return time.monotonic() - began

            return (await poisson(40.0, 2500, ask))[1000:]

    plain, hedged = [sorted(await run(policy)) for policy in ("uncoded", "hedge")]
    assert sum(hedged) <= 1.02 * sum(plain)
