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
from typing import Any, NamedTuple

from codedinvnet.common.progress import Progress
from codedinvnet.evaluation.quantiles import percentile, rounded
from codedinvnet.net.client import Answer, HttpClient, described, parse_origin
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

    Args:
        call: sends request number i, due at a `time.perf_counter` time. What it raises is raised
            in the end.
        gaps: seconds before each request.
        label: of the progress bar.
        leave: whether the progress bar stays when all is done.
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


def percentiles(latencies: Sequence[float]) -> dict[str, float | None]:
    """Return percentiles of latencies in ms, their mean and maximum; None if infinite."""
    found = {name: percentile(latencies, share) for name, share in PERCENTILES.items()}
    found |= {"mean": math.fsum(latencies) / len(latencies), "max": max(latencies)}
    return {f"{name}_ms": rounded(value, 3) for name, value in found.items()}


class Ended(NamedTuple):
    """One request."""

    due: float
    """When it should have been sent, by `time.perf_counter`."""
    latency: float
    """In ms; infinite without a good answer."""


@dataclass
class Load:
    """Sends HTTP requests to servers in turn, and records how they end.

    Attributes:
        urls: the servers, each a full URL.
        bodies: what is posted, in turn; none: GET.
        headers: of every request.
        timeout: seconds for an answer, connecting included.
        good: tells whether the answer to request i is right; None: whether its status is 200.
        ended: the requests, in the order of their ends.
        late: how late each was sent, in ms.
        errors: how many requests ended with which status or error.
    """

    urls: Sequence[str]
    bodies: Sequence[bytes] = ()
    headers: Sequence[tuple[str, str]] = ()
    timeout: float = 60.0
    good: Callable[[int, Answer], bool] | None = None
    ended: list[Ended] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    async def run(self, gaps: Sequence[float], label: str = "load") -> dict[str, Any]:
        """Send a request after each of the gaps, in seconds; return the figures."""
        origins = [parse_origin(url, "URL") for url in self.urls]
        clients = [HttpClient(origin, connect=self.timeout) for origin in origins]

        async def send(number: int, due: float) -> None:
            self.late.append(1000 * (time.perf_counter() - due))
            word = await self._ask(clients[number % len(clients)], number)
            latency = math.inf if word else 1000 * (time.perf_counter() - due)
            self.ended.append(Ended(due, latency))
            if word:
                self.errors[word] += 1

        began = time.perf_counter()
        await open_loop(send, gaps, label)
        for client in clients:
            client.close()
        answered = [end for end in self.ended if math.isfinite(end.latency)]
        last = max((end.due + end.latency / 1000 for end in answered), default=began)
        return {
            "requests": len(gaps),
            "answered": len(answered),
            "errors": dict(self.errors),
            # Until the last answer: waiting for what never comes is the client's own.
            "goodput_per_s": round(len(answered) / max(last - began, sum(gaps)), 1),
            **percentiles([end.latency for end in self.ended]),
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
        if answer.status != 200:
            return f"HTTP {answer.status}"
        return "" if self.good is None or self.good(number, answer) else "wrong"
