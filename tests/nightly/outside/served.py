"""`codedinvnet serve` under harm: killed workers, malformed requests, bombs."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.processes import descendants
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle
from tests.client import Client, Reply, connect
from tests.nightly.outside.counts import Count, counting, long_json
from tests.processes import server

BUNDLE = "mnist"
OPTIONS = ("--k", "4", "--set", "hang-timeout-ms=1000")
DEADLINE = 5.0
"""Seconds."""
BURST = 50
"""Malformed requests that are under way at once."""
BOMBS, BOMB_BYTES = 6, 154_000_000
"""Sent a second, and the size of each when it is decompressed; it is sent as 150 KB."""


@dataclass(frozen=True)
class Sizes:
    """How much each part sends."""

    queries: int = 10_000
    rate: float = 60.0
    malformed: int = 5_000
    bomb_seconds: float = 10.0


async def run(sizes: Sizes, log: Path) -> list[Count]:
    """Harm a served bundle in one part after another."""
    torch.set_num_threads(1)
    bundle = load_bundle(BUNDLE)
    images, _ = sample_images(BUNDLE).batch(torch.arange(1000))
    labels = bundle.classify(bundle.embed(images)).argmax(1).numpy()
    async with (
        server(BUNDLE, *OPTIONS, "--deadline-ms", str(1000 * DEADLINE), log=log) as process,
        connect(process.address, BUNDLE, images.numpy()) as client,
    ):
        await client.warm(([i] for i in range(30)), log)
        harm = Harm(client, process.pid, sizes, labels)
        return [await harm.workers(), await harm.malformed(), await harm.bombs(), await harm.long()]


class Harm:
    """The parts of a served bundle, each a coroutine that returns its count.

    The labels are the bundle's own answers to the client's images.
    """

    def __init__(self, client: Client, pid: int, sizes: Sizes, labels: np.ndarray) -> None:
        self.client, self.pid, self.sizes, self.labels = client, pid, sizes, labels
        self.draw = random.Random(0)

    def _counting(self, part: str) -> AbstractAsyncContextManager[Count]:
        return counting(part, self.client.address, self.pid, "/v2/health/live")

    def _check(self, count: Count, replies: Sequence[Reply]) -> None:
        for reply in replies:
            count.take(reply.status)
            if reply.ok:
                count.late += reply.latency > DEADLINE + 1.0
                direct = [outcome == "direct" for outcome in reply.outcomes]
                right = reply.labels == self.labels[list(reply.rows)]
                count.wrong += reply.returned != reply.identity or bool((direct & ~right).any())
        count.notes |= Counter(outcome for reply in replies for outcome in reply.outcomes)

    async def _load(self, label: str, rate: float, count: int) -> list[Reply]:
        rows = [[self.draw.randrange(len(self.client.images))] for _ in range(count)]
        return await self.client.load(rows, rate=rate, seed=0, label=label)

    async def workers(self) -> Count:
        """Send images while workers and the fork server are killed, and workers are stopped."""
        done: Counter[str] = Counter()
        async with self._counting("workers") as count:
            harming = asyncio.create_task(self._harm(done))
            replies = await self._load("workers", self.sizes.rate, self.sizes.queries)
            harming.cancel()
            with suppress(asyncio.CancelledError):
                await harming
            self._check(count, replies)
            count.notes |= done
        return count

    async def _harm(self, done: Counter[str]) -> None:
        for turn in range(1, 10_000):
            await asyncio.sleep(2.0)
            state = (await self.client.get("page/state"))["workers"]
            workers = [worker["pid"] for worker in state if worker["pid"]]
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
        async with self._counting("malformed") as count:
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
        draw, image = self.draw, self.client.images[:1]
        tensor: dict[str, Any] = {
            "name": "images",
            "shape": list(image.shape),
            "datatype": "UINT8",
            "parameters": {"binary_data_size": image.nbytes},
        }
        head: dict[str, Any] = {"id": "spoilt", "inputs": [tensor]}
        junk, kind = draw.choice(JUNK), draw.randrange(6)
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

    async def bombs(self) -> Count:
        """Send small bodies that decompress to large ones, while large requests are answered."""
        lists = b'{"inputs":[{"name":"images","shape":[1],"datatype":"UINT8","data":['
        bomb = gzip.compress(lists + b"[]," * (BOMB_BYTES // 3) + b"[]]}]}", 9)
        statuses: Counter[str] = Counter()
        tasks: list[asyncio.Task[None]] = []

        async def send() -> None:
            statuses[str(await _post(self.client, bomb, {"Content-Encoding": "gzip"}))] += 1

        async with self._counting("bombs") as count:
            end = time.monotonic() + self.sizes.bomb_seconds
            large = asyncio.create_task(self._large(end))
            while time.monotonic() < end:
                tasks.append(asyncio.create_task(send()))
                await asyncio.sleep(1 / BOMBS)
            await asyncio.gather(*tasks)
            self._check(count, await large)
            count.notes |= {f"bombs with {status}": n for status, n in statuses.items()}
        return count

    async def _large(self, end: float) -> list[Reply]:
        """Send requests of 100 images, one after another."""
        replies: list[Reply] = []
        while time.monotonic() < end:
            replies.append(await self.client.infer(f"large {len(replies)}", range(100)))
        return replies

    async def long(self) -> Count:
        """Send JSON that takes long to read."""
        async with self._counting("long JSON") as count:
            for body in long_json():
                for headers in ({}, {"Inference-Header-Content-Length": str(len(body))}):
                    count.take(await _post(self.client, body, headers))
        return count


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
        return (await client.post(body, headers)).status
    except OSError:
        return 0


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
