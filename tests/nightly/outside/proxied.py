"""`codedinvnet gateway` in front of harmful upstreams: wrong, mute, endless, or not there."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.processes import running
from codedinvnet.gateway.command import run_gateway
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.resolve import Address, Resolver, literal
from tests.nightly.outside.counts import Count, counting, long_json

INFER = "/v2/models/m/infer"
SERVICE = 0.005
"""Seconds of a request."""
CLIENTS, PAUSE = 8, 0.01
"""Clients, and seconds between an answer and the next request of each."""
HANGS = 20.0
"""Seconds of a name lookup that hangs."""
UNHEALTHY = b'{"error":"Stub process \'m_0_0\' is not healthy."}'
STUB_TIMEOUT = 1.0
"""Seconds without a sign of life after which Triton gives a stub up."""
MIB = 1 << 20
MEMORY = 128
"""MiB that the gateway may hold where memory is what is harmed."""


SECONDS = 20.0
"""Seconds of each part."""


class Asked:
    """A request that an upstream reads, and what answers it."""

    def __init__(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.path, self.body, self.writer = path, body, writer

    @property
    def number(self) -> int:
        """The number of a client's request."""
        found: int = json.loads(self.body)["inputs"][0]["data"][0]
        return found

    def write(self, status: int, body: bytes, kind: str = "application/json") -> None:
        """Answer."""
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        if not self.writer.is_closing():
            self.writer.write(head.encode() + body)

    def answer(self, number: int, padding: str = "0") -> None:
        """Answer as a request of this number is to be."""
        tensor = {"name": "y", "datatype": "FP32", "shape": [1], "data": [3 * number + 1]}
        text = json.dumps({"id": str(number), "outputs": [tensor]})
        self.write(200, f'{text[:-1]},"padding":[{padding}]}}'.encode())


Handler = Callable[[Asked], Awaitable[None]]


async def sound(asked: Asked) -> None:
    """Answer as a good server does."""
    await asyncio.sleep(SERVICE)
    asked.answer(asked.number)


class Upstream:
    """A server of HTTP/1.1 in this process, which can be restarted.

    Args:
        handler: answers what is no health probe.
    """

    def __init__(self, handler: Handler = sound) -> None:
        self.handler, self.port = handler, 0
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen."""
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Close the port and all connections, as a process that ends does."""
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                asked = Asked(head.split(b" ", 2)[1].decode(), body, writer)
                if asked.path == "/v2/health/ready":
                    asked.write(200, b"")
                else:
                    await self.handler(asked)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()


def gateway(options: str) -> None:
    """Run a gateway in this process, for which looking up a name that ends with .hangs hangs."""

    def lookup(name: str, port: int) -> list[Address]:
        if name.endswith(".hangs"):
            time.sleep(HANGS)
        return literal("127.0.0.1", port)

    run_gateway(lambda: GatewayOptions.model_validate_json(options), Resolver(lookup))


@asynccontextmanager
async def harmed(
    part: str, log: Path, *upstreams: Upstream, bound: float | None = None, **options: Any
) -> AsyncIterator[tuple[HttpClient, Count]]:
    """Count what clients see of a gateway while the body runs."""
    async with AsyncExitStack() as stack:
        for upstream in upstreams:
            await upstream.start()
            stack.callback(upstream.stop)
        urls = [*(upstream.url for upstream in upstreams), *options.pop("others", ())]
        given = {"upstream": urls, "port": 0, "deadline_ms": 5000.0, "slots": 8, **options}
        code = f"from {__name__} import gateway; gateway({json.dumps(given)!r})"
        process = running(sys.executable, "-c", code, log=log)
        found = await asyncio.to_thread(process.__enter__)
        try:
            client = HttpClient(parse_origin(found.address))
            stack.callback(client.close)
            async with counting(part, found.address, found.pid, "/livez", bound) as count:
                yield client, count
        finally:
            began = time.monotonic()
            await asyncio.to_thread(process.__exit__, None, None, None)
        count.notes["stopped in, s"] = round(time.monotonic() - began, 1)


async def clients(client: HttpClient, count: Count, seconds: float) -> None:
    """Send numbered requests for some seconds, and count how they end."""
    end, numbers = time.monotonic() + seconds, iter(range(1, 1 << 24))  # float32 has all of these
    times: list[float] = []

    async def keep_asking() -> None:
        while (began := time.monotonic()) < end:
            number = next(numbers)
            tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}
            body = json.dumps({"id": str(number), "inputs": [tensor]}).encode()
            try:
                answer = await client.ask("POST", INFER, 30.0, body)
            except OSError:
                count.take(0)
                await asyncio.sleep(PAUSE)
                continue
            took = time.monotonic() - began
            count.take(answer.status)
            if answer.status == 200:
                found = re.search(rb'"data": \[(\d+)\]', answer.body)
                count.wrong += found is None or int(found[1]) != 3 * number + 1
                count.late += took > 6.0
                times.append(took)
            await asyncio.sleep(PAUSE)

    await asyncio.gather(*[keep_asking() for _ in range(CLIENTS)])
    times.sort()
    count.notes |= {f"p{100 * q:g}, ms": _at(times, q) for q in (0.5, 0.99)}


def _at(times: list[float], share: float) -> float:
    return round(1000 * times[min(len(times) - 1, math.ceil(share * len(times)))], 1)


# 1: another request's answer


class Stub:
    """Answers as Triton's Python backend does when its process stands still.

    After a second Triton gives up the requests that wait, but leaves them in the stub's queue. The
    stub goes on with these, and each answer goes to whoever asks next.
    """

    def __init__(self, count: Count) -> None:
        self.count, self.going = count, asyncio.Event()
        self.left: deque[int] = deque()
        self.going.set()

    async def __call__(self, asked: Asked) -> None:
        """Answer a request."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.going.wait(), STUB_TIMEOUT)
        number = asked.number
        if not self.going.is_set():
            self.left.append(number)
            asked.write(500, UNHEALTHY)
            return
        await asyncio.sleep(SERVICE)
        self.left.append(number)
        found = self.left.popleft()
        self.count.wrong_at_border += found != number
        asked.answer(found)


async def another_answer(seconds: float, log: Path) -> Count:
    """Let stubs stand still; an operator restarts a server whose stub was given up.

    The upstreams have other clients as well, who get wrong answers.
    """
    draw, stops = random.Random(0), 0
    upstreams = [Upstream(), Upstream()]
    async with harmed("another's answer", log, *upstreams) as (client, count):
        stubs = [Stub(count) for _ in upstreams]
        for upstream, stub in zip(upstreams, stubs, strict=True):
            upstream.handler = stub
        others = [HttpClient(parse_origin(upstream.url)) for upstream in upstreams]
        asking = asyncio.gather(
            clients(client, count, seconds),
            *(clients(other, Count("others"), seconds) for other in others),
        )
        while not asking.done():
            await asyncio.sleep(draw.uniform(0.2, 1.0))
            upstream, stub = draw.choice([*zip(upstreams, stubs, strict=True)])
            stub.going.clear()
            await asyncio.sleep(draw.uniform(0.3, 3.0))
            stub.going.set()
            stops += 1
            await asyncio.sleep(0.5)
            if stub.left:
                upstream.stop()
                stub.left.clear()
                await upstream.start()
        await asking
        for other in others:
            other.close()
        count.notes["stops"] = stops
    return count


# 2 and 6: names and files that hang


async def hanging_lookup(seconds: float, log: Path) -> Count:
    """Name upstreams whose lookups hang."""
    upstreams = [Upstream(), Upstream()]
    others = ["dns+http://one.hangs:80", "http://two.hangs:80"]
    async with harmed("lookups hang", log, *upstreams, others=others) as (client, count):
        await clients(client, count, seconds)
    return count


async def fifo(seconds: float, log: Path) -> Count:
    """Put a FIFO in place of the file with the upstreams."""
    upstream, file = Upstream(), log.with_suffix(".upstreams")
    await upstream.start()
    file.write_text(upstream.url)
    options: dict[str, Any] = {"upstreams_file": str(file)}
    async with harmed("a FIFO", log, Upstream(), **options) as (client, count):
        asking = asyncio.create_task(clients(client, count, seconds))
        await asyncio.sleep(seconds / 4)
        pipe = file.with_suffix(".fifo")
        os.mkfifo(pipe)
        pipe.replace(file)
        await asking
        file.unlink()
    upstream.stop()
    return count


# 3: replies that are hard to read


async def hard_replies(seconds: float, log: Path) -> Count:
    """Answer with unterminated strings, large JSON, and what is no answer."""
    draw = random.Random(0)
    padding = "0," * (MIB // 2) + "0"
    endless = b'{"error":"' + b'\\"' * 32_000

    async def handler(asked: Asked) -> None:
        kind = draw.randrange(40)
        if kind == 0:
            asked.write(500, endless)
        elif kind == 1:
            asked.write(503, endless, "text/event-stream")
        elif kind == 2:
            asked.write(799, b"{" * 65_536)
        elif kind == 3:
            asked.writer.write(b"HTTP/1.1 200 " + b"x" * 70_000)
            asked.writer.close()
        elif kind < 8:
            asked.answer(asked.number, padding)
        else:
            await sound(asked)

    async with harmed("hard replies", log, Upstream(handler), Upstream()) as (client, count):
        await clients(client, count, seconds)
    return count


async def long_requests(seconds: float, log: Path) -> Count:
    """Send JSON that takes long to read."""

    async def handler(asked: Asked) -> None:
        asked.write(200, b"{}")

    async with harmed("long requests", log, Upstream(handler)) as (client, count):
        for body in long_json():
            for headers in ((), (("Inference-Header-Content-Length", str(len(body))),)):
                count.take((await client.ask("POST", INFER, 30.0, body, headers)).status)
    return count


# 4: memory


async def full_memory(seconds: float, log: Path) -> Count:
    """Send bodies to mute upstreams, and read large answers slowly."""

    async def mute(asked: Asked) -> None:
        if asked.path == "/large":
            asked.write(200, bytes(10 * MIB), "application/octet-stream")
        else:
            await asked.writer.wait_closed()

    options: dict[str, Any] = {"max_memory": MEMORY, "deadline_ms": 1000.0, "bound": MEMORY}
    upstreams = [Upstream(mute) for _ in range(3)]
    async with harmed("memory", log, *upstreams, slots=64, **options) as (client, count):
        end = time.monotonic() + seconds

        async def keep_sending() -> None:
            while time.monotonic() < end:
                try:
                    answer = await client.ask("POST", INFER, 30.0, bytes(2 * MIB))
                    count.take(answer.status)
                except OSError:
                    count.take(0)
                await asyncio.sleep(PAUSE)

        with _slow_readers(client) as read:
            await asyncio.gather(
                *(keep_sending() for _ in range(60)), *(read(end) for _ in range(100))
            )
    return count


@contextmanager
def _slow_readers(client: HttpClient) -> Iterator[Callable[[float], Awaitable[None]]]:
    """Yield what asks for a large answer, and reads 64 KiB of it a second."""
    request = b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    writers: list[asyncio.StreamWriter] = []

    async def read(end: float) -> None:
        place = client.origin
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(place.host, place.port, limit=4096)
            writers.append(writer)
            writer.write(request)
            while time.monotonic() < end and await reader.read(65_536):
                await asyncio.sleep(1.0)

    yield read
    for writer in writers:
        writer.transport.abort()


async def run(log: Path) -> list[Count]:
    """Harm a gateway in one part after another."""
    parts = (another_answer, hanging_lookup, hard_replies, long_requests, full_memory, fifo)
    return [await part(SECONDS, log) for part in parts]
