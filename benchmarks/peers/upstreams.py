"""Servers with one queue each, whose service times and faults are drawn from a seed.

Run as `python -m benchmarks.peers.upstreams SPEC`, where SPEC is the JSON of a `Spec`. A server
works on one request at a time, first come, first served, and finishes what it has begun even if the
client has gone: this is what most model servers do, and what makes careless hedging expensive.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import cast

import numpy as np

SERVICE = 0.010
"""Seconds of one request."""
SPREAD = 0.03
"""Standard deviation of a service time, as a share of it."""
BLOCK, SHAPE, LONGEST_BLOCK = 0.1, 1.5, 3.0
"""Shortest block in seconds, exponent of its Pareto distribution, and longest block."""
SHARE = 0.01
"""Share of requests that block their server, or whose answer is held back."""
LONG, LONG_SHARE = 20.0, 0.1
"""How many times longer a long request takes, and how many requests are long."""
SLOW = 10.0
"""How many times slower a slow server is."""
ALL_SLOW, SLOW_PERIOD, SLOW_FOR = 3.0, 5.0, 1.0
"""All servers are so many times slower for so many seconds of every period."""

DRAWN = ("none", "pareto", "exponential", "lognormal", "sizes", "held", "all-slow")
"""Faults that every server has alike."""
OF_ONE = ("slow", "garbage")
"""Faults that only the first server has."""
FROM_OUTSIDE = ("silent", "killed", "refused")
"""Faults that the benchmark inflicts on the process of the first server."""
FAULTS = (*DRAWN, *OF_ONE, *FROM_OUTSIDE)


@dataclass(frozen=True)
class Spec:
    """What one process of upstream servers does.

    Attributes:
        ports: one for each server.
        first: index of the first of these servers among all.
        fault: one of FAULTS.
        seed: of service times.
    """

    ports: list[int]
    first: int = 0
    fault: str = "none"
    seed: int = 0


def mean_service(fault: str) -> float:
    """Return the mean seconds of a request under a fault, blocks and slow servers left out."""
    return SERVICE * (1 + LONG_SHARE * (LONG - 1)) if fault == "sizes" else SERVICE


def is_long(seed: int, request: int) -> bool:
    """Tell whether a request is long by itself, whichever server gets it."""
    return bool(np.random.default_rng([seed, 7, request]).random() < LONG_SHARE)


@dataclass
class Server:
    """One server: a queue, the seconds it was busy, and what it has started.

    Attributes:
        index: its number among all servers.
        spec: what its process does.
        free_at: when the last request in its queue ends.
        busy: seconds of work it has taken on.
        started: how many requests it has taken on.
    """

    index: int
    spec: Spec
    free_at: float = 0.0
    busy: float = 0.0
    started: int = 0
    draws: Iterator[tuple[float, float, float, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.draws = self._draws()

    def _draws(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield for each request a normal, an exponential and a uniform number, and a block."""
        rng = np.random.default_rng([self.spec.seed, self.index])
        while True:
            draws = (
                rng.standard_normal(1000),
                rng.exponential(size=1000),
                rng.random(1000),
                np.minimum(BLOCK * (1 + rng.pareto(SHAPE, 1000)), LONGEST_BLOCK),
            )
            yield from zip(*(each.tolist() for each in draws), strict=True)

    def take(self, request: int, now: float) -> tuple[float, float]:
        """Return the seconds a request keeps the server busy, and those its answer is held."""
        normal, exponential, uniform, block = next(self.draws)
        fault, seconds, held = self.spec.fault, SERVICE * (1 + SPREAD * normal), 0.0
        if fault == "pareto" and uniform < SHARE:
            seconds += block
        elif fault == "held" and uniform < SHARE:
            held = block
        elif fault == "exponential":
            seconds = SERVICE * exponential
        elif fault == "lognormal":
            seconds = SERVICE * float(np.exp(normal - 0.5))
        elif fault == "sizes" and is_long(self.spec.seed, request):
            seconds *= LONG
        elif fault == "slow" and self.index == 0:
            seconds *= SLOW
        elif fault == "all-slow" and now % SLOW_PERIOD < SLOW_FOR:
            seconds *= ALL_SLOW
        self.started += 1
        self.busy += seconds
        return seconds, held


class Connection(asyncio.Protocol):
    """A kept connection to a server: parses requests with a known length, answers in order."""

    def __init__(self, server: Server, servers: list[Server]) -> None:
        self.server, self.servers, self.buffer = server, servers, b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1").split("\r\n")
            found = [line for line in head if line.lower().startswith("content-length:")]
            length = int(found[0].split(":")[1]) if found else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            method, path, _ = head[0].split(" ")
            self._answer(method, path, body)

    def _answer(self, method: str, path: str, body: bytes) -> None:
        if method == "POST":
            self._work(json.loads(body))
        elif path.startswith("/m/"):
            self._work({"id": path[3:]})
        elif path == "/stats":
            stats = [(server.busy, server.started) for server in self.servers]
            self._write(200, json.dumps(stats).encode())
        elif path.endswith("/ready") or path.endswith("/live"):
            self._write(200, b"{}")
        elif path == "/v2/models/m":
            tensor = {"datatype": "FP32", "shape": [-1]}
            told = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
            self._write(200, json.dumps({"name": "m", **told}).encode())
        else:
            self._write(404, b"{}")

    def _work(self, request: dict[str, object]) -> None:
        """Queue a request, and answer when its turn is over."""
        server, now = self.server, time.monotonic()
        if server.spec.fault == "garbage" and server.index == 0:
            self._write(503, b'{"error": "broken"}')
            return
        identity = str(request["id"])
        seconds, held = server.take(int(identity), now)
        server.free_at = max(now, server.free_at) + seconds
        tensor = {"name": "y", "datatype": "FP32", "shape": [1], "data": [int(identity)]}
        body = json.dumps({"model_name": "m", "id": identity, "outputs": [tensor]}).encode()
        loop = asyncio.get_running_loop()
        loop.call_at(loop.time() + server.free_at + held - now, self._write, 200, body)

    def _write(self, status: int, body: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def request(number: int) -> bytes:
    """Return the body of the request of this number."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}
    return json.dumps({"id": str(number), "inputs": [tensor]}).encode()


def is_answer(number: int, body: bytes) -> bool:
    """Tell whether a body answers the request of this number."""
    return bool(json.loads(body)["outputs"][0]["data"] == [number])


async def serve(spec: Spec) -> None:
    """Serve until the process is ended; prints a line when all ports are open."""
    loop = asyncio.get_running_loop()
    servers = [Server(spec.first + n, spec) for n in range(len(spec.ports))]
    for server, port in zip(servers, spec.ports, strict=True):
        await loop.create_server(
            lambda server=server: Connection(server, servers),  # type: ignore[misc]
            "127.0.0.1",
            port,
            backlog=1024,
        )
    print("ready", flush=True)
    await asyncio.Event().wait()


def command(spec: Spec) -> list[str]:
    """Return the command that runs these servers."""
    words = ["-W", "ignore", "-m", "benchmarks.peers.upstreams", json.dumps(asdict(spec))]
    return [sys.executable, *words]


if __name__ == "__main__":
    asyncio.run(serve(Spec(**json.loads(sys.argv[1]))))
