"""An open-loop load client: requests leave when they are due, whether or not others were answered.

Latency counts from when a request was due, so a server that stands still makes everything that
waits for it late. A request without a good answer is infinitely late, so a server gains nothing by
shedding load.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from codedinvnet.common.progress import Progress
from codedinvnet.common.quantiles import percentile, rounded
from codedinvnet.net.client import HttpClient, described, parse_origin
from codedinvnet.net.collector import sparing_collector

AHEAD = 0.05
"""Seconds until the first request is due."""
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


async def open_loop(
    call: Callable[[int, float], Coroutine[Any, Any, object]],
    gaps: Sequence[float],
    label: str,
    *,
    leave: bool = True,
) -> None:
    """Send requests when they are due, and wait until all have ended.

    `call` sends request number i, due at a `time.perf_counter` time; `gaps` are the seconds before
    each. What a call raises is raised in the end.
    """
    pending: set[asyncio.Task[object]] = set()
    errors: list[BaseException] = []
    how: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 1.0, "leave": leave}
    bar = Progress(total=len(gaps), desc=label, unit="request", **how)

    def ended(task: asyncio.Task[object]) -> None:
        pending.discard(task)
        bar.update()
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)

    with bar, sparing_collector():
        due = time.perf_counter() + AHEAD
        for number, gap in enumerate(gaps):
            due += gap
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(call(number, due))
            pending.add(task)
            task.add_done_callback(ended)
        while pending:
            await asyncio.wait(pending)
    if errors:
        raise errors[0]


@dataclass
class Load:
    """Sends HTTP requests to servers in turn, and records how they end.

    Attributes:
        urls: the servers, each a full URL.
        bodies: what is posted, in turn; none: GET.
        headers: of every request.
        timeout: seconds for an answer, connecting included.
        latencies: of the requests in the order of their ends, in ms; infinite without a good one.
        late: how late each was sent, in ms.
        errors: how many requests ended with which status or error.
    """

    urls: Sequence[str]
    bodies: Sequence[bytes] = ()
    headers: Sequence[tuple[str, str]] = ()
    timeout: float = 60.0
    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    async def run(self, gaps: Sequence[float], label: str = "load") -> dict[str, Any]:
        """Send a request after each of the gaps, in seconds; return the figures."""
        origins = [parse_origin(url, "URL") for url in self.urls]
        clients = [HttpClient(origin, connect=self.timeout) for origin in origins]
        began = last = time.perf_counter()

        async def send(number: int, due: float) -> None:
            nonlocal last
            self.late.append(1000 * (time.perf_counter() - due))
            word = await self._ask(clients[number % len(clients)], number)
            if word:
                self.errors[word] += 1
            else:
                last = time.perf_counter()
            self.latencies.append(math.inf if word else 1000 * (last - due))

        await open_loop(send, gaps, label)
        for client in clients:
            client.close()
        answered = sum(map(math.isfinite, self.latencies))
        found = {name: percentile(self.latencies, share) for name, share in PERCENTILES.items()}
        found |= {"mean": math.fsum(self.latencies) / len(gaps), "max": max(self.latencies)}
        return {
            "requests": len(gaps),
            "answered": answered,
            "errors": dict(self.errors),
            # Until the last answer: waiting for what never comes is the client's own.
            "goodput_per_s": round(answered / max(last - began, sum(gaps)), 1),
            **{f"{name}_ms": rounded(value, 3) for name, value in found.items()},
            "sent_late_p99_ms": round(percentile(self.late, 0.99), 3),
        }

    async def _ask(self, client: HttpClient, number: int) -> str:
        """Send one request; return what is wrong with its answer, "" if nothing is."""
        body = self.bodies[number % len(self.bodies)] if self.bodies else None
        method = "GET" if body is None else "POST"
        path = "" if client.path else "/"
        try:
            answer = await client.ask(method, path, self.timeout, body, self.headers)
        except OSError as error:
            return described(error)
        return "" if answer.status == 200 else f"HTTP {answer.status}"
