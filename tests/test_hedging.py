"""The hedging transport of httpx, with real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.hedging import HedgingTransport
from tests.toys import Handler, Reply, Request, Toy

EXAMPLE = "examples/hedged_client.py"
STALL = 3.0
"""Seconds; nobody may wait for so long."""


def echo(request: Request) -> Reply:
    return Reply(request.body or request.path.encode(), delay=0.005)


def stalls(every: int, seconds: float = STALL) -> Handler:
    """Answer as `echo` does, but hold every so many-th answer back."""

    def handle(request: Request) -> Reply:
        reply = echo(request)
        return reply._replace(delay=seconds) if request.number % every == every - 1 else reply

    return handle


class Client(httpx.AsyncClient):
    transport: HedgingTransport

    @property
    def copies(self) -> int:
        return self.transport.hedges["won"] + self.transport.hedges["lost"]


def predictions(*toys: Toy) -> int:
    """Return how many requests were seen besides probes."""
    return sum(each.path.startswith("/predict") for toy in toys for each in toy.seen)


@contextlib.asynccontextmanager
async def client(*toys: Toy, **options: Any) -> AsyncIterator[Client]:
    transport = HedgingTransport([toy.url for toy in toys], **options)
    async with Client(transport=transport, base_url="http://model") as found:
        found.transport = transport
        yield found


@contextlib.asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, of which Python 3.10 has none."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    handle = loop.call_later(seconds, task.cancel, f"it took more than {seconds} s")
    yield
    handle.cancel()


async def ask(asking: Client, requests: int = 60, path: str = "/predict") -> None:
    """Send requests one after the other; each answer must be its own."""
    for i in range(requests):
        reply = await asking.post(path, content=f"{i:04}")
        assert (reply.status_code, reply.text) == (200, f"{i:04}")


@pytest.mark.parametrize(("cancel", "least"), [(None, 1), (True, 5)])
async def test_a_late_answer_is_hedged_and_the_loser_closed_if_wanted(
    cancel: bool | None, least: int
) -> None:
    """A server that is left to finish gets no further request meanwhile, so few are late there."""
    async with (
        Toy(echo) as a,
        Toy(echo) as b,
        client(a, b, hedge="POST /predict", budget=0.2, cancel=cancel) as asking,
    ):
        await ask(asking)
        a.handle = stalls(5)
        async with timeout(STALL):
            await ask(asking, 100, "/predict?q=1")
        assert asking.transport.hedges["won"] >= least
        assert a.cut >= 5 if cancel else a.cut == 0  # the losers
        assert 160 + least <= predictions(a, b) <= 160 + asking.copies
        assert asking.copies <= 0.2 * 160  # the budget
        asking.headers["x-hedge"] = "off"
        a.handle = b.handle = stalls(1)
        seen = predictions(a, b)
        with pytest.raises(httpx.ReadTimeout):
            await asking.post("/predict", content="0000", timeout=0.5)
        assert predictions(a, b) == seen + 1


async def test_a_post_that_is_not_named_reaches_one_server_only() -> None:
    """Stalls, 503s, resets and kills: each request is seen once at most, unless refused."""

    def handle(request: Request) -> Reply:
        match request.number % 10:
            case 3:
                return Reply(b"", status=503)
            case 5:
                return Reply(resets())
            case 7:
                return Reply(request.body, delay=0.3)
        return echo(request)

    async with Toy(handle) as a, Toy(echo) as b, client(a, b) as asking:
        await ask(asking, 40, "/v2/models/m/infer")  # known times, so that late ones are late

        async def one(i: int) -> str:
            try:
                reply = await asking.post("/orders", content=f"order {i}")
            except httpx.TransportError:
                return "error"
            return "ok" if reply.text == f"order {i}" else str(reply.status_code)

        async def kill() -> None:
            await asyncio.sleep(0.2)
            await b.kill()
            await asyncio.sleep(0.2)
            await b.start(b.port)

        killing = asyncio.create_task(kill())
        told = []
        for start in range(0, 200, 4):
            told += await asyncio.gather(*(one(i) for i in range(start, start + 4)))
        await killing
        assert told.count("ok") > 120
        assert {"error", "503"} < set(told)
        orders = [each.body for each in (*a.seen, *b.seen) if each.path == "/orders"]
        assert len(set(orders)) == len(orders)
        hedges = asking.copies
        stateful = '{"parameters": {"sequence_id": 7}}'
        a.handle = b.handle = stalls(3, 0.3)
        for _ in range(10):
            assert (await asking.post("/v2/models/m/infer", content=stateful)).text == stateful
        assert asking.copies == hedges


async def test_a_connection_is_used_again_after_a_slow_reader() -> None:
    """It may have stopped reading at the last part, whatever the size of parts is."""

    def handle(request: Request) -> Reply:
        size = request.path.removeprefix("/long")
        return Reply(bytes(int(size))) if size.isdigit() else echo(request)

    async with Toy(handle) as only, client(only) as asking, timeout(2 * STALL):
        for size in range(1056 << 10, 2 << 20, 32 << 10):  # longer than what is held whole
            async with asking.stream("GET", f"/long{size}") as reply:
                found = 0
                async for part in reply.aiter_bytes():
                    found += len(part)
                    await asyncio.sleep(0.01)
            assert found == size
            assert (await asking.post("/orders", content="1")).text == "1"


async def test_closing_ends_what_is_under_way() -> None:
    async def drops() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.sleep(2 * STALL)

    def handle(request: Request) -> Reply:
        reply = {"/stream": Reply(drops()), "/orders": Reply(b"", delay=2 * STALL)}
        return reply.get(request.path, echo(request))

    async with Toy(handle) as only, timeout(STALL):
        asking = Client(transport=HedgingTransport([only.url], slots=4), base_url="http://model")

        async def read() -> None:
            async with asking.stream("GET", "/stream") as reply:
                async for _ in reply.aiter_bytes():
                    pass

        waiting = [asyncio.create_task(asking.post("/orders")), asyncio.create_task(read())]
        while not {"/stream", "/orders"} <= {each.path for each in only.seen}:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await asking.aclose()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(each, httpx.TransportError) for each in found] == [True, True]


async def resets() -> AsyncIterator[bytes]:
    raise ConnectionError
    yield b""


async def test_a_killed_server_and_one_that_fails_lose_nothing() -> None:
    async with (
        Toy(echo) as a,
        Toy(echo) as b,
        Toy(echo) as c,
        client(a, b, c, hedge=["POST /predict"]) as asking,
    ):
        await ask(asking)
        await b.kill()
        await ask(asking)
        c.handle = lambda request: Reply(b"broken", status=500)
        seen = len(c.seen)
        await ask(asking)
        assert len(c.seen) - seen <= 12  # ejected, and on probation now and then
        await b.start(b.port)
        c.handle = echo
        async with timeout(10):
            while not (b.seen and c.seen[-1].path == b.seen[-1].path == "/back"):
                await asking.post("/back", content="x")
        a.handle = b.handle = c.handle = lambda request: Reply(b"no", status=500)
        assert (await asking.post("/predict", content="x")).status_code == 500
        for toy in (a, b, c):
            await toy.kill()
        for _ in range(4):
            with pytest.raises(httpx.TransportError):
                await asking.post("/predict", content="x")


def events(name: str, first: float) -> AsyncIterator[bytes]:
    async def found() -> AsyncIterator[bytes]:
        yield b": comment\n\n"
        yield b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        await asyncio.sleep(first)
        for i in range(5):
            yield b'data: {"choices": [{"delta": {"content": "%s%d"}}]}\n\n' % (name.encode(), i)
            await asyncio.sleep(0.005)

    return found()


async def test_a_stream_is_hedged_until_its_first_content_and_never_mixed() -> None:
    def handle(name: str, every: int) -> Handler:
        def answer(request: Request) -> Reply:
            first = STALL if request.number % every == every - 1 else 0.01
            return Reply(events(name, first), type="text/event-stream; charset=utf-8")

        return answer

    async with (
        Toy(handle("a", 1000)) as a,
        Toy(handle("b", 1000)) as b,
        client(a, b, hedge=["POST /v1/chat/*"]) as asking,
        timeout(20),
    ):
        for i in range(120):
            if i == 60:
                a.handle = handle("a", 5)
                began = asyncio.get_running_loop().time()
            async with asking.stream("POST", "/v1/chat/completions", content=b"{}") as reply:
                text = "".join([part async for part in reply.aiter_text()])
            assert [text.count(f'"a{i}"') + text.count(f'"b{i}"') for i in range(5)] == [1] * 5
            assert ("a0" in text) != ("b0" in text)
            assert text.count("comment") == 1
        assert asyncio.get_running_loop().time() - began < 4 * STALL
        assert asking.transport.hedges["won"] >= 3
        before = a.cut + b.cut
        async with asking.stream("POST", "/v1/chat/completions", content=b"{}"):
            pass  # a client that leaves
        await asyncio.sleep(0.1)
        assert a.cut + b.cut > before


async def test_wrong_use_is_refused_in_words_of_python() -> None:
    transport = HedgingTransport(["http://127.0.0.1:9"])
    async with httpx.AsyncClient(transport=transport) as asking:
        with pytest.raises(httpx.UnsupportedProtocol, match="base_url"):
            await asking.post("/predict")
    with httpx.Client(transport=transport) as sync, pytest.raises(TypeError, match="AsyncClient"):
        sync.get("http://model/predict")
    with pytest.raises(UserError, match=r"^no_hedge: 'GET'"):
        HedgingTransport(["http://127.0.0.1:9"], no_hedge="GET")


def test_the_example_runs_without_torch() -> None:
    code = "import runpy, sys; sys.modules['torch'] = None; "
    code += f"runpy.run_path('{EXAMPLE}', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hedged:     p50" in done.stdout
