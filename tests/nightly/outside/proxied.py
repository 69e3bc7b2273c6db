"""`codedinvnet gateway` under what is hard to read and what fills its memory."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.processes import running
from codedinvnet.net.client import HttpClient, parse_origin
from tests.nightly.outside.counts import Count, counting, long_json
from tests.upstream import Request, Upstream, answer

INFER = "/v2/models/m/infer"
SERVICE = 0.005
"""Seconds of a request."""
CLIENTS, PAUSE = 8, 0.01
"""Clients, and seconds between an answer and the next request of each."""
MIB = 1 << 20
MEMORY = 128
"""MiB that the gateway may hold where memory is what is harmed."""
SECONDS = 20.0
"""Seconds of each part."""


async def sound(request: Request, _: asyncio.StreamWriter) -> bytes:
    """Answer with the request's own body, as a good server does."""
    await asyncio.sleep(SERVICE)
    return answer(request.body)


@asynccontextmanager
async def harmed(
    part: str, log: Path, *upstreams: Upstream, bound: float | None = None, **options: Any
) -> AsyncIterator[tuple[HttpClient, Count]]:
    """Count what clients see of a gateway while the body runs."""
    async with AsyncExitStack() as stack:
        for upstream in upstreams:
            await stack.enter_async_context(upstream)
        given = {"deadline_ms": 5000.0, "slots": 8, **options}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        words += [f"--upstream={upstream.url}" for upstream in upstreams]
        command = (sys.executable, "-m", "codedinvnet", "gateway", "--port=0", *words)
        process = running(*command, log=log)
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
    end, numbers = time.monotonic() + seconds, iter(range(1, 1 << 24))

    async def keep_asking() -> None:
        while (began := time.monotonic()) < end:
            body = b'{"number":%d}' % next(numbers)
            try:
                found = await client.ask("POST", INFER, 30.0, body)
            except OSError:
                count.take(0)
            else:
                count.take(found.status)
                count.wrong += found.status == 200 and not found.body.startswith(body)
                count.late += time.monotonic() - began > 6.0
            await asyncio.sleep(PAUSE)

    await asyncio.gather(*[keep_asking() for _ in range(CLIENTS)])


async def hard_replies(log: Path) -> Count:
    """Answer with unterminated strings, large JSON, and what is no answer."""
    draw = random.Random(0)
    endless = b'{"error":"' + b'\\"' * 32_000

    async def handler(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        match draw.randrange(40):
            case 0:
                return answer(endless, 500)
            case 1:
                return answer(endless, 503, "Content-Type: text/event-stream\r\n")
            case 2:
                return answer(b"{" * 65_536, 799)
            case 3:
                writer.write(b"HTTP/1.1 200 " + b"x" * 70_000)
                return None
            case kind:
                return answer(request.body + b"[%s0]" % (b"0," * (kind < 8) * (MIB // 2)))

    async with harmed("hard replies", log, Upstream(handler), Upstream(sound)) as (client, count):
        await clients(client, count, SECONDS)
    return count


async def long_requests(log: Path) -> Count:
    """Send JSON that takes long to read."""

    async def empty(request: Request, _: asyncio.StreamWriter) -> bytes:
        return answer(b"{}")

    async with harmed("long requests", log, Upstream(empty)) as (client, count):
        for body in long_json():
            for headers in ((), (("Inference-Header-Content-Length", str(len(body))),)):
                count.take((await client.ask("POST", INFER, 30.0, body, headers)).status)
    return count


async def full_memory(log: Path) -> Count:
    """Send bodies to mute upstreams, and read large answers slowly."""

    async def mute(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        if request.path == "/large":
            return answer(bytes(10 * MIB))
        await writer.wait_closed()
        return None

    options: dict[str, Any] = {"max_memory": MEMORY, "deadline_ms": 1000.0, "bound": MEMORY}
    upstreams = [Upstream(mute) for _ in range(3)]
    async with harmed("memory", log, *upstreams, slots=64, **options) as (client, count):
        end = time.monotonic() + SECONDS

        async def keep_sending() -> None:
            while time.monotonic() < end:
                try:
                    count.take((await client.ask("POST", INFER, 30.0, bytes(2 * MIB))).status)
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
    return [await part(log) for part in (hard_replies, long_requests, full_memory)]
