"""An open-loop client: requests leave at given times, whatever has become of the ones before."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import numpy as np

LONGEST_WAIT = 15.0
"""Seconds after which a request counts as an error."""
LEAD = 0.2
"""Seconds between the start of the client and the first arrival."""


def arrivals(rate: float, count: int, seed: int, *, bursty: bool = False) -> np.ndarray:
    """Return the seconds at which requests arrive.

    Args:
        rate: mean requests a second.
        count: how many.
        seed: of all that is drawn.
        bursty: whether the rate switches between half and twice the mean, for exponential times of
            one second in the mean at the slow rate and half a second at the fast one; else Poisson.
    """
    rng = np.random.default_rng([seed, 1])
    if not bursty:
        return np.cumsum(rng.exponential(1 / rate, count))
    times: list[float] = []
    now = 0.0
    while len(times) < count:
        for factor, length in ((0.5, 1.0), (2.0, 0.5)):
            ends = now + rng.exponential(length)
            at = now + rng.exponential(1 / (factor * rate))
            while at < ends:
                times.append(at)
                at += rng.exponential(1 / (factor * rate))
            now = ends
    return np.array(times[:count])


@dataclass
class Outcome:
    """What became of all requests.

    Attributes:
        seconds: latency of each from its arrival on; NaN for errors.
        errors: how many got no answer with status 200 in time.
        wrong: how many got another request's answer.
    """

    seconds: np.ndarray
    errors: int = 0
    wrong: int = 0
    statuses: dict[str, int] = field(default_factory=dict)


class _Connection(asyncio.Protocol):
    """Sends one request at a time, and reads an answer with a known length."""

    def __init__(self, load: _Load) -> None:
        self.load, self.buffer, self.request = load, b"", -1
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.load.transports.add(self.transport)

    def send(self, request: int) -> None:
        assert self.transport is not None
        self.request = request
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [request]}
        body = json.dumps({"id": str(request), "inputs": [tensor]}).encode()
        head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: {self.load.host}\r\n"
        kind = "content-type: application/json\r\n"
        self.transport.write(f"{head}{kind}content-length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if (end := self.buffer.find(b"\r\n\r\n")) < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        body, status = self.buffer[end + 4 : end + 4 + length], int(head[9:12])
        self.buffer = b""
        request, self.request = self.request, -1
        if request >= 0:
            self.load.answered(request, status, body)
            if b"connection: close" not in head:
                self.load.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:
            self.load.transports.discard(self.transport)
        if self in self.load.idle:
            self.load.idle.remove(self)
        if self.request >= 0:
            self.load.answered(self.request, 0, b"")
            self.request = -1


class _Load:
    """The requests under way."""

    def __init__(self, url: str, times: np.ndarray) -> None:
        found = urlsplit(url)
        self.host, self.port = found.hostname or "127.0.0.1", found.port or 80
        self.times, self.began = times, 0.0
        self.idle: list[_Connection] = []
        self.outcome = Outcome(np.full(len(times), np.nan))
        self.left = len(times)
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open: dict[int, asyncio.TimerHandle] = {}
        self.transports: set[asyncio.Transport] = set()

    def answered(self, request: int, status: int, body: bytes) -> None:
        timer = self.open.pop(request, None)
        if timer is None:
            return
        timer.cancel()
        found = self.outcome
        if status == 200:
            if json.loads(body)["outputs"][0]["data"] == [request]:
                found.seconds[request] = time.monotonic() - self.began - self.times[request]
            else:
                found.wrong += 1
        else:
            found.errors += 1
            found.statuses[str(status)] = found.statuses.get(str(status), 0) + 1
        self.left -= 1
        if not self.left and not self.over.done():
            self.over.set_result(None)

    async def _opened(self, request: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self), self.host, self.port
            )
        except OSError:
            self.answered(request, 0, b"")
            return
        connection.send(request)

    async def run(self) -> Outcome:
        loop, tasks = asyncio.get_running_loop(), set()
        self.began = time.monotonic() + LEAD
        for request, at in enumerate(self.times.tolist()):
            wait = self.began + at - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            self.open[request] = loop.call_later(LONGEST_WAIT, self.answered, request, -1, b"")
            if self.idle:
                self.idle.pop().send(request)
            else:
                task = loop.create_task(self._opened(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        await self.over
        for transport in self.transports:
            transport.abort()
        await asyncio.sleep(0)
        return self.outcome


def load(url: str, times: np.ndarray) -> Outcome:
    """Send a request at each of these times, and return what became of them."""

    async def main() -> Outcome:
        return await _Load(url, times).run()

    return asyncio.run(main())
