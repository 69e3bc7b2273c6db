"""`python -m benchmarks load`: the latency of any HTTP server under an open-loop load.

Requests leave when they are due, whether or not others were answered. Latency counts from when a
request was due, so a server that stands still makes everything that waits for it late. A request
without a good answer is infinitely late, so a server gains nothing by shedding load.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.common.quantiles import percentile, rounded
from codedinvnet.net.client import HttpClient, described, parse_origin
from codedinvnet.net.collector import sparing_collector

AHEAD = 0.05
"""Seconds until the clock of the first request starts."""
JSON = (("Content-Type", "application/json"),)
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def arrivals(rate: float, count: int, seed: int, *, bursty: bool = False) -> np.ndarray:
    """Return the seconds at which requests arrive, (count,).

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


async def open_loop(
    call: Callable[[int, float], Coroutine[Any, Any, object]],
    times: Sequence[float] | np.ndarray,
    label: str,
    *,
    leave: bool = True,
) -> None:
    """Send requests when they are due, and wait until all have ended.

    `call` sends request number i, due at a `time.perf_counter` time; `times` are the seconds of
    each from the start on. What a call raises is raised in the end.
    """
    tasks: list[asyncio.Task[object]] = []
    how: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 1.0, "leave": leave}
    with Progress(total=len(times), desc=label, unit="request", **how) as bar, sparing_collector():
        began = time.perf_counter() + AHEAD
        for number, at in enumerate(times):
            due = began + float(at)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(call(number, due))
            task.add_done_callback(lambda _: bar.update())
            tasks.append(task)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end


@dataclass
class Load:
    """Sends HTTP requests to a server, and records how they end.

    Attributes:
        url: of every request.
        bodies: what is posted, in turn; none: GET.
        headers: of every request.
        timeout: seconds for an answer, connecting included.
        right: tells whether a body answers the request of this number; None: any does.
        content: for streams: returns what the first content of this request's stream looks like;
            latency counts until it came. Each request has a connection of its own then.
        others: URLs of further instances; each request goes to one of all, drawn at random.
        latencies: by the number of the request, in ms; infinite without a good answer.
        late: how late each was sent, in ms.
        errors: how many requests ended with which status or error; "wrong" is another's answer.
    """

    url: str
    bodies: Sequence[bytes] = ()
    headers: Sequence[tuple[str, str]] = ()
    timeout: float = 60.0
    right: Callable[[int, bytes], bool] | None = None
    content: Callable[[int], bytes] | None = None
    others: Sequence[str] = ()
    latencies: np.ndarray = field(default_factory=lambda: np.zeros(0))
    late: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    async def run(self, times: Sequence[float] | np.ndarray, label: str = "load") -> dict[str, Any]:
        """Send a request at each of these seconds, and return the figures."""
        origins = [parse_origin(url, "URL") for url in (self.url, *self.others)]
        clients = [HttpClient(origin, connect=self.timeout) for origin in origins]
        drawn = np.random.default_rng(len(times)).integers(len(clients), size=len(times))
        self.latencies = np.full(len(times), math.inf)
        began = last = time.perf_counter()

        async def send(number: int, due: float) -> None:
            nonlocal last
            self.late.append(1000 * (time.perf_counter() - due))
            ask = self._ask if self.content is None else self._stream
            word, came = await ask(clients[drawn[number]], number)
            if word:
                self.errors[word] += 1
            else:
                last = time.perf_counter()
                self.latencies[number] = 1000 * (came - due)

        await open_loop(send, times, label, leave=False)
        for client in clients:
            client.close()
        answered = int(np.isfinite(self.latencies).sum())
        found = {name: percentile(self.latencies, share) for name, share in PERCENTILES.items()}
        found |= {"mean": float(self.latencies.mean()), "max": float(self.latencies.max())}
        return {
            "requests": len(times),
            "answered": answered,
            "errors": dict(self.errors),
            # Until the last answer: waiting for what never comes is the client's own.
            "goodput_per_s": round(answered / max(last - began, float(times[-1])), 1),
            **{f"{name}_ms": rounded(value, 3) for name, value in found.items()},
            "sent_late_p99_ms": round(percentile(self.late, 0.99), 3),
        }

    async def _ask(self, client: HttpClient, number: int) -> tuple[str, float]:
        """Send a request; return what is wrong with its answer, "" if nothing, and when it came."""
        body = self.bodies[number % len(self.bodies)] if self.bodies else None
        method = "GET" if body is None else "POST"
        path = "" if client.path else "/"
        try:
            answer = await client.ask(method, path, self.timeout, body, self.headers)
        except OSError as error:
            return described(error), 0.0
        came = time.perf_counter()
        if answer.status != 200:
            return f"HTTP {answer.status}", came
        right = self.right is None or self.right(number, answer.body)
        return "" if right else "wrong", came

    async def _stream(self, client: HttpClient, number: int) -> tuple[str, float]:
        """Ask for a stream; return what is wrong with it, and when its first content came."""
        assert self.content is not None
        body = self.bodies[number % len(self.bodies)]
        head = f"POST {client.path.decode()} HTTP/1.1\r\nhost: {client.origin.authority}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        head += f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        writer = None
        try:
            async with asyncio.timeout(self.timeout):
                host, port = client.origin.host, client.origin.port
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(head.encode() + body)
                status = (await reader.readline()).decode("latin-1")[9:12]
                if status != "200":
                    return f"HTTP {status}", 0.0
                await reader.readuntil(self.content(number))
                came = time.perf_counter()
                rest = await reader.read()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            return type(error).__name__, 0.0
        finally:
            if writer is not None:
                writer.close()
        return "" if rest.endswith(b"0\r\n\r\n") else "cut", came


def run(*, url: str, body: Path | None, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Send requests at Poisson times; return percentiles, errors and goodput.

    Raises:
        UserError: if the rate or the duration is not positive, or the body cannot be read.
    """
    if not (rate > 0 and seconds > 0):
        raise UserError("--rate, --seconds: must be above 0")
    try:
        bodies = [] if body is None else [body.read_bytes()]
    except OSError as error:
        raise UserError(f"--body: cannot read {body}: {error.strerror}") from error
    times = arrivals(rate, max(1, round(rate * seconds)), seed)
    return asyncio.run(Load(url, bodies, JSON).run(times, url))
