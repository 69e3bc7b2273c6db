"""The hedging transport of httpx and httpx2, with real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

import httpx
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.hedging import HedgingTransport
from codedinvnet.net.background import LoopThread
from tests.upstream import Reply, Request, Toy

EXAMPLE = "examples/hedged_client.py"
STALL = 3.0
"""Seconds; nobody may wait for so long."""


def echo(request: Request) -> Reply:
    return Reply(request.body or request.path.encode(), delay=0.005)


def stalls(every: int, seconds: float = STALL) -> Callable[[Request], Reply]:
    """Answer as `echo` does, but hold every so many-th answer back."""

    def handle(request: Request) -> Reply:
        reply = echo(request)
        return reply._replace(delay=seconds) if request.number % every == every - 1 else reply

    return handle


def predictions(*toys: Toy) -> int:
    """Return how many requests were seen besides probes."""
    return sum(each.path.startswith("/predict") for toy in toys for each in toy.requests)


class Asking:
    """A client, synchronous or not, that the test's event loop asks."""

    def __init__(self, transport: HedgingTransport, module: ModuleType, sync: bool) -> None:
        self.transport, self.module, self.is_sync = transport, module, sync
        kind = module.Client if sync else module.AsyncClient
        self.client = kind(transport=transport, base_url="http://model")

    async def _do(self, name: str, *args: Any, **options: Any) -> Any:
        method = getattr(self.client, name)
        if self.is_sync:
            return await asyncio.to_thread(lambda: method(*args, **options))
        return await method(*args, **options)

    async def post(self, path: str, content: str = "x", **options: Any) -> httpx.Response:
        found: httpx.Response = await self._do("post", path, content=content, **options)
        return found

    async def stream(self, path: str, **options: Any) -> AsyncGenerator[str, None]:
        """Yield the parts of an answer; the response is closed when nobody wants more."""
        request = self.client.build_request("POST", path, content="x", **options)
        reply = await self._do("send", request, stream=True)
        try:
            if self.is_sync:
                parts = reply.iter_text()
                while (part := await asyncio.to_thread(next, parts, None)) is not None:
                    yield part
            else:
                async for part in reply.aiter_text():
                    yield part
        finally:
            await asyncio.to_thread(reply.close) if self.is_sync else await reply.aclose()

    async def close(self) -> None:
        await self._do("close" if self.is_sync else "aclose")


@contextlib.asynccontextmanager
async def client(
    *toys: Toy | str, module: ModuleType = httpx, sync: bool = False, **options: Any
) -> AsyncIterator[Asking]:
    urls = [toy if isinstance(toy, str) else toy.url for toy in toys]
    asking = Asking(HedgingTransport(urls, **options), module, sync)
    try:
        yield asking
    finally:
        await asking.close()


@pytest.fixture(params=["httpx", "httpx2-sync"])
def any_client(request: pytest.FixtureRequest) -> AnyClient:
    """`client` of each module, one of them asynchronous and the other synchronous."""
    name, _, sync = request.param.partition("-")
    return functools.partial(client, module=import_module(name), sync=bool(sync))


AnyClient: TypeAlias = Callable[..., contextlib.AbstractAsyncContextManager[Asking]]


async def ask(asking: Asking, requests: int = 60, path: str = "/predict") -> None:
    """Send requests one after the other; each answer must be its own."""
    for i in range(requests):
        reply = await asking.post(path, f"{i:04}")
        assert (reply.status_code, reply.text) == (200, f"{i:04}")


@pytest.mark.parametrize(("cancel", "least"), [(None, 1), (True, 5)])
async def test_a_late_answer_is_hedged_and_the_loser_closed_if_wanted(
    any_client: AnyClient, cancel: bool | None, least: int
) -> None:
    """A server that is left to finish gets no further request meanwhile, so few are late there."""
    async with (
        Toy(echo) as a,
        Toy(echo) as b,
        any_client(a, b, hedge="POST /predict", budget=0.2, cancel=cancel) as asking,
    ):
        await ask(asking)
        a.handle = stalls(5)
        async with asyncio.timeout(STALL):
            await ask(asking, 100, "/predict?q=1")
        assert asking.transport.stats.won >= least
        assert a.cut >= 5 if cancel else a.cut == 0  # the losers
        stats = asking.transport.stats
        assert (stats.requests, stats.won <= stats.hedged) == (160, True)
        assert 160 + least <= predictions(a, b) <= 160 + stats.hedged
        assert stats.hedged <= 0.2 * 160  # the budget
        a.handle = b.handle = stalls(1)
        seen = predictions(a, b)
        for unhedged in ({"extensions": {"hedge": False}}, {"headers": {"x-hedge": "off"}}):
            with pytest.raises(asking.module.ReadTimeout):
                await asking.post("/predict", timeout=0.2, **unhedged)
        assert predictions(a, b) == seen + 2
        assert asking.transport.stats.hedged == stats.hedged


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
                reply = await asking.post("/orders", f"order {i}")
            except httpx.TransportError:
                return "error"
            return "ok" if reply.text == f"order {i}" else str(reply.status_code)

        async def kill() -> None:
            await asyncio.sleep(0.2)
            await b.stop()
            await asyncio.sleep(0.2)
            await b.start()

        killing = asyncio.create_task(kill())
        told = []
        for start in range(0, 200, 4):
            told += await asyncio.gather(*(one(i) for i in range(start, start + 4)))
        await killing
        assert told.count("ok") > 120
        assert {"error", "503"} < set(told)
        orders = [each.body for each in (*a.requests, *b.requests) if each.path == "/orders"]
        assert len(set(orders)) == len(orders)
        hedges = asking.transport.stats.hedged
        stateful = '{"parameters": {"sequence_id": 7}}'
        a.handle = b.handle = stalls(3, 0.3)
        for _ in range(10):
            assert (await asking.post("/v2/models/m/infer", stateful)).text == stateful
        assert asking.transport.stats.hedged == hedges


async def drops() -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.sleep(2 * STALL)


def never(request: Request) -> Reply:
    """Answer /stream with its beginning, and nothing else at all; probes at once."""
    if request.method == "GET":
        return echo(request)
    return Reply(drops()) if request.path == "/stream" else Reply(b"", delay=2 * STALL)


async def begun(toy: Toy, path: str) -> None:
    """Wait until a request has come."""
    while path not in {each.path for each in toy.requests}:
        await asyncio.sleep(0.01)


async def until_cut(toys: Sequence[Toy], count: int) -> None:
    """Wait until so many connections were closed before their answer's end."""
    while sum(toy.cut for toy in toys) < count:
        await asyncio.sleep(0.01)


async def test_closing_ends_what_is_under_way(any_client: AnyClient) -> None:
    async with Toy(never) as only, asyncio.timeout(STALL), any_client(only, slots=4) as asking:

        async def read() -> list[str]:
            return [part async for part in asking.stream("/stream")]

        waiting = [asyncio.create_task(asking.post("/orders")), asyncio.create_task(read())]
        await begun(only, "/orders")
        await begun(only, "/stream")
        await asyncio.sleep(0.1)
        await asking.close()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(each, asking.module.TransportError) for each in found] == [True, True]


async def test_a_time_out_ends_the_call(any_client: AnyClient) -> None:
    async with Toy(never) as only, any_client(only, slots=1) as asking, asyncio.timeout(STALL):
        limits, module = asking.module.Timeout(None), asking.module
        limits.read = 0.2
        with pytest.raises(module.ReadTimeout, match=r"0\.2 s"):
            await asking.post("/orders", timeout=limits)
        await until_cut([only], 1)
        parts = asking.stream("/stream", timeout=limits)
        assert await anext(parts) == "first"
        with pytest.raises(module.ReadTimeout):
            await anext(parts)
        await until_cut([only], 2)
        first = asyncio.create_task(asking.post("/first", timeout=module.Timeout(1.0)))
        await begun(only, "/first")
        with pytest.raises(module.PoolTimeout):  # the only slot is taken
            await asking.post("/second", timeout=module.Timeout(2 * STALL, pool=0.1))
        with pytest.raises(module.ReadTimeout):
            await first
        assert not any(each.path == "/second" for each in only.requests)
        only.handle = lambda request: Reply(b"slow", delay=0.3)
        assert (await asking.post("/orders", timeout=None)).text == "slow"


def test_an_interrupt_ends_the_call_of_a_synchronous_client() -> None:
    servers, only, caller = LoopThread("servers"), Toy(never), threading.get_ident()
    servers.run(only.start())

    # In a process of pytest-xdist's, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        servers.run(begun(only, "/orders"))
        signal.pthread_kill(caller, signal.SIGINT)

    with httpx.Client(transport=HedgingTransport([only.url]), base_url="http://model") as asking:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            asking.post("/orders", timeout=None)
        servers.run(asyncio.wait_for(until_cut([only], 1), STALL))
    signal.signal(signal.SIGINT, before)
    servers.run(only.stop())
    servers.stop()


async def test_a_cancelled_call_ends_all_its_attempts() -> None:
    async with (
        Toy(echo) as a,
        Toy(echo) as b,
        client(a, b, hedge="POST /predict", budget=1.0) as asking,
        asyncio.timeout(2 * STALL),
    ):
        await ask(asking)
        a.handle = b.handle = never
        task = asyncio.create_task(asking.post("/predict", timeout=None))
        seen = predictions(a, b)
        while predictions(a, b) < seen + 2:
            await asyncio.sleep(0.01)
        task.cancel()
        await until_cut([a, b], 2)
        with pytest.raises(asyncio.CancelledError):
            await task


async def resets() -> AsyncIterator[bytes]:
    raise ConnectionError
    yield b""


def events(name: str, first: float) -> AsyncIterator[bytes]:
    async def found() -> AsyncIterator[bytes]:
        yield b": comment\n\n"
        yield b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        await asyncio.sleep(first)
        for i in range(5):
            yield b'data: {"choices": [{"delta": {"content": "%s%d"}}]}\n\n' % (name.encode(), i)
            await asyncio.sleep(0.002)

    return found()


async def test_a_stream_is_hedged_until_its_first_content_and_never_mixed(
    any_client: AnyClient,
) -> None:
    def handle(name: str, every: int) -> Callable[[Request], Reply]:
        def answer(request: Request) -> Reply:
            first = STALL if request.number % every == every - 1 else 0.01
            return Reply(events(name, first), type="text/event-stream; charset=utf-8")

        return answer

    async with (
        Toy(handle("a", 1000)) as a,
        Toy(handle("b", 1000)) as b,
        any_client(a, b, hedge=["POST /v1/chat/*"], budget=0.5) as asking,
        asyncio.timeout(20 * STALL),
    ):
        for i in range(90):
            if i == 50:
                a.handle = handle("a", 5)
            text = "".join([part async for part in asking.stream("/v1/chat/completions")])
            assert [text.count(f'"a{i}"') + text.count(f'"b{i}"') for i in range(5)] == [1] * 5
            assert ("a0" in text) != ("b0" in text)
            assert text.count("comment") == 1
        assert asking.transport.stats.won >= 1
        cut = a.cut + b.cut
        async with contextlib.aclosing(asking.stream("/v1/chat/completions")) as parts:
            await anext(parts)  # a client that leaves
        await until_cut([a, b], cut + 1)


async def test_wrong_use_is_refused_in_words_of_python() -> None:
    transport = HedgingTransport(["http://127.0.0.1:9"])
    async with httpx.AsyncClient(transport=transport) as asking:
        with pytest.raises(httpx.UnsupportedProtocol, match="base_url"):
            await asking.post("/predict")
    transport = HedgingTransport(["http://127.0.0.1:9"])
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as asking:
        with pytest.raises(httpx.ConnectError):
            await asking.post("/predict")
        with httpx.Client(transport=transport) as sync, pytest.raises(RuntimeError, match="one"):
            await asyncio.to_thread(sync.get, "http://model/predict")
    with pytest.raises(UserError, match=r"^no_hedge: 'GET'"):
        HedgingTransport(["http://127.0.0.1:9"], no_hedge="GET")


def test_the_example_runs_without_torch_and_httpx2() -> None:
    code = "import runpy, sys; sys.modules['torch'] = sys.modules['httpx2'] = None; "
    code += f"runpy.run_path('{EXAMPLE}', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hedged:     p50" in done.stdout
