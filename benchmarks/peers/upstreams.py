"""Servers with one queue each, whose service times and faults are drawn from a seed.

Run as `python -m benchmarks.peers.upstreams SPEC`, where SPEC is the JSON of a `Spec`. A server
works on one request at a time, first come, first served, and finishes what it has begun even if the
client has gone: this is what most model servers do, and what makes careless hedging expensive.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks.peers.contenders import CHAT

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

CROWD = 0.4
"""Share of every second server's time that other clients take, past any proxy."""

DRAWN = (
    *("none", "pareto", "exponential", "lognormal", "sizes", "held", "all-slow", "antagonists"),
)
"""Faults that every server has alike."""
OF_ONE = ("slow", "garbage")
"""Faults that only the first server has."""
FROM_OUTSIDE = ("silent", "killed", "refused")
"""Faults that the benchmark inflicts on the process of the first server."""
STOPPED = "stopped"
"""The fault in which the benchmark stops the processes of servers, for as long as blocks last."""
FAULTS = (*DRAWN, *OF_ONE, *FROM_OUTSIDE, STOPPED)

KINDS = ("timed", "unnamed", "streams", "onnx")
"""What servers do: wait as long as was drawn; the same on a path that no proxy knows to be safe to
repeat; the same, but the answer is a stream of events; or compute a model in ONNX Runtime."""
PATHS = {"unnamed": "/predict", "streams": CHAT}
"""Kind -> the path of its requests, if that isn't the one of a V2 model."""
MODEL_SECONDS = 0.04
"""Nominal seconds of a request, from which loads of `onnx` follow: the servers share two cores."""
SIDE, IMAGES = 64, 16
"""Pixels of the images that models compute, and how many images there are."""
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
GAP = 0.02
"""Seconds from a stream's first content to its end."""


@dataclass(frozen=True)
class Spec:
    """What one process of upstream servers does.

    Attributes:
        ports: one for each server.
        first: index of the first of these servers among all.
        fault: one of FAULTS.
        seed: of service times.
        kind: one of KINDS.
        model: the ONNX file that these servers compute, if they do.
    """

    ports: list[int]
    first: int = 0
    fault: str = "none"
    seed: int = 0
    kind: str = "timed"
    model: str = ""


def mean_service(fault: str, kind: str = "timed") -> float:
    """Return the mean seconds of a request under a fault, blocks and slow servers left out."""
    if kind == "onnx":
        return MODEL_SECONDS
    return SERVICE * (1 + LONG_SHARE * (LONG - 1)) if fault == "sizes" else SERVICE


def is_long(seed: int, request: int) -> bool:
    """Return whether a request is long by itself, whichever server gets it."""
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
    crowd: Iterator[float] = field(init=False)
    next_other: float = 0.0

    def __post_init__(self) -> None:
        self.draws = self._draws()
        self.crowd = self._crowd()
        if self.spec.model:
            onnxruntime = import_module("onnxruntime")
            own = onnxruntime.SessionOptions()
            own.intra_op_num_threads = own.inter_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(self.spec.model, own)
            size = (IMAGES, 1, 3, SIDE, SIDE)
            self.images = np.random.default_rng(0).standard_normal(size, np.float32)

    def compute(self, request: int) -> None:
        """Run the model."""
        began = time.monotonic()
        self.session.run(None, {"x": self.images[request % IMAGES]})
        self.started += 1
        self.busy += time.monotonic() - began

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

    def _crowd(self) -> Iterator[float]:
        """Yield the seconds between requests of clients that no proxy sees."""
        rng = np.random.default_rng([self.spec.seed, self.index, 1])
        if self.spec.fault != "antagonists" or self.index % 2:
            yield math.inf
        while True:
            yield from rng.exponential(SERVICE / CROWD, 1000).tolist()

    def queue(self, now: float) -> float:
        """Return when a request of now gets its turn, behind all that came before."""
        if not self.next_other:
            self.next_other = now + next(self.crowd)
        while self.next_other <= now:
            self.free_at = max(self.next_other, self.free_at) + SERVICE
            self.next_other += next(self.crowd)
        return max(now, self.free_at)

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
        elif path.endswith(("/ready", "/live", "/health")):
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
        if server.spec.model:
            server.compute(int(identity))
            self._write(200, answer(identity))
            return
        seconds, held = server.take(int(identity), now)
        server.free_at = server.queue(now) + seconds
        loop = asyncio.get_running_loop()
        at = loop.time() + server.free_at + held - now
        if server.spec.kind == "streams":
            self._put(STREAM + chunk(ROLE))
            loop.call_at(at, self._put, chunk(token(int(identity))))
            loop.call_at(at + GAP, self._put, b"0\r\n\r\n")
        else:
            loop.call_at(at, self._write, 200, answer(identity))

    def _write(self, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        self._put(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def _put(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)


def answer(identity: str) -> bytes:
    """Return the body of an answer to a request."""
    tensor = {"name": "y", "datatype": "FP32", "shape": [1], "data": [int(identity)]}
    return json.dumps({"model_name": "m", "id": identity, "outputs": [tensor]}).encode()


def chunk(data: bytes) -> bytes:
    """Return a chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(number: int) -> bytes:
    """Return the event with the first content of the stream of this request."""
    return b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number


def write_model(path: Path) -> None:
    """Write a ResNet-18 for small images, about 150 million multiply-adds, as an ONNX file."""
    torch = import_module("torch")
    model = import_module("torchvision.models").resnet18().eval()
    example = torch.zeros(1, 3, SIDE, SIDE)
    torch.onnx.export(
        model, (example,), path, input_names=["x"], external_data=False, verbose=False
    )


def request(number: int, kind: str = "timed") -> bytes:
    """Return the body of the request of this number."""
    if kind == "streams":
        chat = {"model": "m", "messages": [{"role": "user", "content": str(number)}]}
        return json.dumps({"id": str(number), **chat, "stream": True}).encode()
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}
    return json.dumps({"id": str(number), "inputs": [tensor]}).encode()


def is_answer(number: int, body: bytes) -> bool:
    """Return whether a body answers the request of this number."""
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
