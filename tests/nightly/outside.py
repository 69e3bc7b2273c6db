"""A service tried from outside, by people who mean it no good.

Workers and their fork server are killed and stopped, requests are malformed, clients are slow,
bodies are bombs, and far more is asked than can be answered. What is counted is what clients see.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import torch

from codedinvnet.data import sample_images
from codedinvnet.evaluation.client import Client, Reply, connect
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.processes import descendants, server

OPTIONS = ("--k", "4", "--set", "hang-timeout-ms=1000", "--deadline-ms", "5000")
OVERLOADED = ("--policy", "uncoded", "--workers", "4", "--deadline-ms", "5000")
SLOWED = {"kind": "slow", "delay": {"ms": 50}}
"""It keeps workers busy without a processor, which the client of an overloaded service needs."""
PROBE_PERIOD = 0.01
"""The seconds between two questions whether the service is alive."""
BURST = 50
"""Malformed requests that are under way at once."""
SLOW_SECONDS = 10.0
"""How long slow clients dawdle."""
BOMB_BYTES = 6_000_000
"""The size of a bomb when it is decompressed; a body of as many images may have more."""
OVERLOAD = 5.0
"""What is asked of the service, in multiples of what it can answer."""


@dataclass(frozen=True)
class Sizes:
    """How much each part sends."""

    queries: int = 10_000
    rate: float = 60.0
    malformed: int = 5_000
    slow: int = 200
    bombs: int = 6
    overload_seconds: float = 20.0


@dataclass
class Count:
    """What clients saw of one part.

    Attributes:
        part: its name.
        sent: requests.
        answered: requests with status 200.
        wrong: answers with another id or label than the bundle's own direct or decoded one.
        late: answers later than the deadline, and those with status 504.
        refused: requests with status 503.
        client_errors: requests with another status below 500.
        server_errors: requests with another status of 500 and more.
        lost: requests without any response.
        probe_ms: the longest time that a question whether the service is alive took.
        memory_mib: the front end's resident memory when the part was over.
        descriptors: the front end's open files when the part was over.
        notes: what else the part tells.
    """

    part: str
    sent: int = 0
    answered: int = 0
    wrong: int = 0
    late: int = 0
    refused: int = 0
    client_errors: int = 0
    server_errors: int = 0
    lost: int = 0
    probe_ms: float = 0.0
    memory_mib: int = 0
    descriptors: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, status: int) -> None:
        """Count a response by its status; 0 is none."""
        self.sent += 1
        if status == 200:
            self.answered += 1
        elif status == 0:
            self.lost += 1
        elif status == 503:
            self.refused += 1
        elif status == 504:
            self.late += 1
        elif status < 500:
            self.client_errors += 1
        else:
            self.server_errors += 1


async def run(name: str, sizes: Sizes, seed: int, log: Path) -> dict[str, Count]:
    """Try services of a bundle from outside, one part after another; return the parts' counts.

    Args:
        name: of a bundle of which sample images ship.
        sizes: how much each part sends.
        seed: of everything that is drawn.
        log: where the servers' log goes.
    """
    torch.set_num_threads(1)
    faults = log.with_suffix(".faults.json")
    faults.write_text(json.dumps({"faults": [SLOWED]}), encoding="utf-8")
    counts = []
    for options in (OPTIONS, (*OVERLOADED, "--faults", str(faults))):
        async with serving(name, options, sizes, seed, log) as outsider:
            parts = outsider.parts() if options is OPTIONS else (outsider.overloaded,)
            counts += [await part() for part in parts]
    return {count.part: count for count in counts}


@asynccontextmanager
async def serving(
    name: str, options: Sequence[str], sizes: Sizes, seed: int, log: Path
) -> AsyncIterator[Outsider]:
    """Serve a bundle, and yield who tries it from outside."""
    bundle = load_bundle(name)
    images, _ = sample_images(name).batch(torch.arange(1000))
    async with (
        server(name, *options, log=log) as process,
        connect(process.address, bundle.info.name, images.numpy()) as client,
    ):
        await client.warm(([i] for i in range(30)), log)
        yield Outsider(bundle, client, process.pid, sizes, random.Random(seed), seed)


class Outsider:
    """The parts, each a coroutine that returns its count.

    Args:
        bundle: for the offline answers.
        client: of the service.
        pid: the front end's process.
        sizes: how much each part sends.
        draw: what is drawn.
        seed: of the arrivals.
    """

    def __init__(
        self,
        bundle: Bundle,
        client: Client,
        pid: int,
        sizes: Sizes,
        draw: random.Random,
        seed: int,
    ) -> None:
        self.client, self.pid, self.sizes, self.draw, self.seed = client, pid, sizes, draw, seed
        scores = bundle.classify(bundle.embed(torch.from_numpy(client.inputs["images"])))
        self.labels = scores.argmax(1).numpy()

    def parts(self) -> tuple[Callable[[], Any], ...]:
        """Return the parts that one service goes through, in their order."""
        return self.harmed, self.malformed, self.slow, self.bombs

    @asynccontextmanager
    async def _counted(self, part: str) -> AsyncIterator[Count]:
        count = Count(part)
        async with probing(self.client.address) as longest:
            yield count
            count.probe_ms = round(1000 * await longest(), 1)
        count.memory_mib = memory(self.pid) >> 20
        count.descriptors = descriptors(self.pid)

    def _check(self, count: Count, replies: Sequence[Reply], deadline: float = 5.0) -> None:
        for reply in replies:
            count.take(reply.status)
            if not reply.ok:
                continue
            count.late += reply.latency > deadline + 1.0
            direct = [outcome == "direct" for outcome in reply.outcomes]
            right = reply.labels == self.labels[list(reply.rows)]
            count.wrong += reply.returned != reply.identity or bool((direct & ~right).any())
        outcomes = Counter(outcome for reply in replies for outcome in reply.outcomes)
        count.notes |= dict(outcomes)

    async def _load(self, label: str, rate: float, count: int) -> list[Reply]:
        rows = [[self.draw.randrange(self.client.count)] for _ in range(count)]
        return await self.client.load(rows, rate=rate, seed=self.seed, label=label, leave=True)

    async def harmed(self) -> Count:
        """Send images while workers and the fork server are killed, and workers are stopped."""
        done: Counter[str] = Counter()
        async with self._counted("harmed") as count:
            harming = asyncio.create_task(self._harm(done))
            replies = await self._load("harmed", self.sizes.rate, self.sizes.queries)
            harming.cancel()
            with suppress(asyncio.CancelledError):
                await harming
            self._check(count, replies)
            count.notes |= dict(done)
        return count

    async def _harm(self, done: Counter[str]) -> None:
        for turn in range(1, 10_000):
            await asyncio.sleep(2.0)
            workers = [
                w["pid"] for w in (await self.client.get("page/state"))["workers"] if w["pid"]
            ]
            if turn % 5 == 0:
                servers = set(descendants(self.pid)) - set(workers)
                forks = [p for p in servers if b"forkserver" in _command(p)]
                done["fork servers killed"] += _signal(forks[:1], signal.SIGKILL)
            elif workers and turn % 2:
                done["workers killed"] += _signal(self.draw.sample(workers, 1), signal.SIGKILL)
            elif workers:
                done["workers stopped"] += _signal(self.draw.sample(workers, 1), signal.SIGSTOP)

    async def malformed(self) -> Count:
        """Send requests that are wrong in every way, none of which may be a 5xx."""
        async with self._counted("malformed") as count:
            limit = asyncio.Semaphore(BURST)

            async def send(body: bytes, headers: dict[str, str]) -> int:
                async with limit:
                    return await _post(self.client, body, headers)

            requests = [self._spoilt() for _ in range(self.sizes.malformed)]
            for status in await asyncio.gather(*[send(*request) for request in requests]):
                count.take(status)
        return count

    def _spoilt(self) -> tuple[bytes, dict[str, str]]:
        """Return a request that was right before something was done to it."""
        draw, image = self.draw, self.client.inputs["images"][:1]
        head: dict[str, Any] = {
            "id": "spoilt",
            "inputs": [
                {
                    "name": "images",
                    "shape": list(image.shape),
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": image.nbytes},
                }
            ],
        }
        tensor, junk = head["inputs"][0], draw.choice(JUNK)
        kind = draw.randrange(6)
        if kind == 0:
            tensor[draw.choice(list(tensor))] = junk
        elif kind == 1:
            head[draw.choice(["inputs", "parameters", "outputs", "id"])] = junk
        elif kind == 2:
            tensor["data"] = junk
        written = json.dumps(head).encode()
        headers = {"Inference-Header-Content-Length": str(len(written))}
        body = written + image.tobytes()
        if kind == 3:
            body = body[: draw.randrange(len(body))]
        elif kind == 4:
            spoilt = bytearray(body)
            for _ in range(8):
                spoilt[draw.randrange(len(written))] = draw.randrange(256)
            body = bytes(spoilt)
        elif kind == 5:
            headers["Inference-Header-Content-Length"] = draw.choice(
                ["-1", "x", "9" * 30, str(len(body) + 1), "0", "1e3"]
            )
        return body, headers

    async def slow(self) -> Count:
        """Open connections that send a byte at a time, while others are answered."""
        async with self._counted("slow") as count:
            dawdlers = [asyncio.create_task(self._dawdle()) for _ in range(self.sizes.slow)]
            rate = self.sizes.rate / 2
            replies = await self._load("slow", rate, round(rate * SLOW_SECONDS))
            closed = await asyncio.gather(*dawdlers)
            self._check(count, replies)
            count.notes |= {"slow clients": len(closed), "closed by the service": sum(closed)}
        return count

    async def _dawdle(self) -> bool:
        """Send a request a byte at a time; return whether the service closed the connection."""
        place = urlsplit(self.client.address)
        try:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
        except OSError:
            return True
        path = urlsplit(self.client.url).path
        text = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000\r\n\r\n".encode()
        end = time.monotonic() + SLOW_SECONDS
        try:
            for byte in text + b" " * 4000:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(self.draw.uniform(0.05, 0.2))
                if reader.at_eof() or time.monotonic() > end:
                    break
        except OSError:
            return True
        finally:
            writer.close()
        return reader.at_eof()

    async def bombs(self) -> Count:
        """Send small bodies that decompress to many small lists, and ask who waits for them."""
        lists = b'{"inputs":[{"name":"images","shape":[1],"datatype":"UINT8","data":['
        bomb = gzip.compress(lists + b"[]," * (BOMB_BYTES // 3) + b"[]]}]}", 9)
        async with self._counted("bombs") as count:
            for _ in range(3):
                sent = [
                    _post(self.client, bomb, {"Content-Encoding": "gzip"})
                    for _ in range(self.sizes.bombs)
                ]
                for status in await asyncio.gather(*sent):
                    count.take(status)
            count.notes["bytes of a bomb"] = len(bomb)
        return count

    async def overloaded(self) -> Count:
        """Ask for several times what the service can answer."""
        capacity = await self._capacity()
        rate = OVERLOAD * capacity
        async with self._counted("overloaded") as count:
            began = time.perf_counter()
            replies = await self._load(
                "overloaded", rate, round(rate * self.sizes.overload_seconds)
            )
            seconds = time.perf_counter() - began
            self._check(count, replies)
            goodput = sum(reply.ok and reply.latency < 5.0 for reply in replies) / seconds
            count.notes |= {
                "capacity a second": round(capacity, 1),
                "goodput of capacity": round(goodput / capacity, 3),
            }
        return count

    async def _capacity(self) -> float:
        """Return the answers a second of clients who ask again as soon as they are answered."""
        seconds, done = self.sizes.overload_seconds / 2, 0
        end = time.perf_counter() + seconds

        async def keep_asking(number: int) -> None:
            nonlocal done
            while time.perf_counter() < end:
                row = self.draw.randrange(self.client.count)
                reply = await self.client.infer(f"capacity-{number}", [row])
                done += reply.ok

        await asyncio.gather(*[keep_asking(i) for i in range(32)])
        return done / seconds


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 1e308, "", "x", "FP32", "BYTES", [], {}, [[]], [-1], [1e9]),
    *([1, 1, 28], [10**9, 1, 28, 28], ["1"], {"a": {"b": []}}, "\u0000", "é" * 300),
    *({"shared_memory_region": "x"}, {"binary_data_size": 10**12}, {"binary_data_size": "7"}),
    *([[0] * 28] * 28, [{"name": "label"}] * 50, [{"name": 3}], list(range(3000))),
)
"""What fields are replaced by."""


async def _post(client: Client, body: bytes, headers: dict[str, str]) -> int:
    """Return the status of a request; 0 without a response."""
    try:
        async with client.session.post(client.url, data=body, headers=headers) as response:
            await response.read()
            return response.status
    except (aiohttp.ClientError, asyncio.TimeoutError):
        return 0


def memory(pid: int) -> int:
    """Return a process's resident bytes (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Return how many file descriptors a process has open (Linux)."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _signal(pids: Sequence[int], number: int) -> int:
    """Send a signal to the service's own processes; return how many there still were."""
    sent = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            sent += 1
    return sent


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@asynccontextmanager
async def probing(address: str) -> AsyncIterator[Callable[[], Any]]:
    """Ask, from a process of its own, whether the service is alive, again and again.

    Yields a coroutine function that ends the asking and returns the seconds of the longest answer.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_probe, args=(address, theirs), daemon=True)
    process.start()
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, ours.recv)  # it has begun

    async def longest() -> float:
        ours.send(None)
        found: float = await loop.run_in_executor(None, ours.recv)
        return found

    try:
        yield longest
    finally:
        process.kill()
        process.join()


def _probe(address: str, stop: Connection) -> None:
    place = urlsplit(address)
    question = b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    longest, stream, began = 0.0, None, 0.0
    stop.send(None)
    while not stop.poll(PROBE_PERIOD):
        began = began or time.monotonic()  # without an answer the question stands
        try:
            if stream is None:
                stream = socket.create_connection((place.hostname, place.port), timeout=30)
            stream.sendall(question)
            if not stream.recv(4096):
                raise ConnectionResetError
        except OSError:
            stream = None  # an idle connection may be closed; the next question opens another
        longest = max(longest, time.monotonic() - began)
        began = began if stream is None else 0.0
    stop.recv()
    stop.send(longest)
