"""Client libraries that hedge, without a proxy: each is an httpx transport in the client's process.

Those of others send their copies to the same host, and leave it to a balancer which server that is:
`Alternating` is that balancer. They only repeat GET requests, so all clients here send GET.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import cycle

import httpx
import numpy as np

from benchmarks.load import Load, open_loop
from benchmarks.peers.upstreams import is_answer
from codedinvnet.common.errors import UserError
from codedinvnet.hedging import HedgingTransport

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=256)


class Alternating(httpx.AsyncBaseTransport):
    """Gives each request, and each copy, to the next server."""

    def __init__(self, ports: list[int]) -> None:
        self._turns = cycle(ports)
        self._inner = httpx.AsyncHTTPTransport(limits=LIMITS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url.copy_with(host="127.0.0.1", port=next(self._turns))
        return await self._inner.handle_async_request(
            httpx.Request(request.method, url, extensions=request.extensions)
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


def _library(
    package: str, module: str, name: str
) -> Callable[[list[int]], httpx.AsyncBaseTransport]:
    def transport(ports: list[int]) -> httpx.AsyncBaseTransport:
        try:
            found = getattr(import_module(module), name)
        except ImportError as error:
            raise UserError(
                f"{package} is not installed: pip install -e '.[benchmarks]'"
            ) from error
        made: httpx.AsyncBaseTransport = found(inner=Alternating(ports))
        return made

    return transport


LIBRARIES: Mapping[str, Callable[[list[int]], httpx.AsyncBaseTransport]] = {
    "ours-httpx": lambda ports: HedgingTransport([f"http://127.0.0.1:{p}" for p in ports]),
    "httpx-hedged": _library("httpx-hedged", "httpx_hedged", "HedgedTransport"),
    "hedge-python": _library("hedge-python", "hedge.transport", "HedgedHttpxTransport"),
}


async def send(load: Load, ports: list[int], peer: str, times: np.ndarray) -> None:
    """Send a request at each of these seconds with a library; latencies and errors go to `load`."""
    load.latencies = np.full(len(times), math.inf)
    transport = LIBRARIES[peer](ports)
    async with httpx.AsyncClient(transport=transport, base_url="http://m", timeout=20) as client:

        async def ask(number: int, due: float) -> None:
            try:
                answer = await asyncio.wait_for(client.get(f"/m/{number}"), load.timeout)
            except (TimeoutError, httpx.HTTPError) as error:
                load.errors[type(error).__name__] += 1
                return
            if answer.status_code != 200:
                load.errors[f"HTTP {answer.status_code}"] += 1
            elif is_answer(number, answer.content):
                load.latencies[number] = 1000 * (time.perf_counter() - due)
            else:
                load.errors["wrong"] += 1

        await open_loop(ask, times, peer, leave=False)
