"""`python -m benchmarks processor`: what a request costs the front end of serve, and the gateway.

Checkouts of this repository are measured in turn, so that an old and a new one can be compared on
one machine. Connections ask again as soon as they are answered.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from benchmarks.peers import upstreams as servers
from benchmarks.processes import Running, process_stat, running
from codedinvnet.common.errors import UserError
from codedinvnet.evaluation import tables
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port
from codedinvnet.net.protocol.http import render_request
from codedinvnet.net.protocol.messages import InferRequest

CONNECTIONS, UPSTREAMS, ROUNDS = 8, 8, 5
PATHS = {"serve, an image": "/v2/models/mnist/infer", "gateway": "/v2/models/m/infer"}
FORMATS = {"ms of a core": ".3f", "from": ".3f", "to": ".3f"}


@contextmanager
def upstreams() -> Iterator[list[str]]:
    """Run servers that take 10 ms a request."""
    spec = servers.Spec([free_port() for _ in range(UPSTREAMS)])
    with running(*servers.command(spec), ready="(ready)"):
        yield [f"http://127.0.0.1:{port}" for port in spec.ports]


def command(tree: Path, *words: str) -> Any:
    """Run a checkout's `codedinvnet` until the context ends."""
    env = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    return running(sys.executable, "-m", "codedinvnet", *words, "--port", "0", env=env)


def body_of(subject: str) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Return the body and headers of a small request."""
    if subject == "gateway":
        return b'{"id": "0", "inputs": []}', (("content-type", "application/json"),)
    images = {"images": np.zeros((1, 1, 28, 28), np.uint8)}
    made = render_request(InferRequest(images), binary=True)
    return made.data, tuple(made.headers.items())


async def ask(address: str, subject: str, count: int) -> None:
    """Send so many requests over the connections.

    Raises:
        UserError: if an answer is not 200.
    """
    client, (body, headers) = HttpClient(parse_origin(address)), body_of(subject)

    async def one() -> None:
        for _ in range(count // CONNECTIONS):
            answer = await client.ask("POST", PATHS[subject], 60.0, body, headers)
            if answer.status != 200:
                raise UserError(f"{subject} answered {answer.status}")

    await asyncio.gather(*[one() for _ in range(CONNECTIONS)])
    client.close()


def cost(process: Running, subject: str, count: int) -> float:
    """Return the milliseconds of processor time that a request takes its server's own process."""
    ticks = []
    for requests in (0, count):
        asyncio.run(ask(process.address, subject, requests))
        user, system = process_stat(process.pid)[11:13]
        ticks.append(int(user) + int(system))
    return 1000 * (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / count


def run(*, tree: Sequence[Path], requests: int) -> dict[str, Any]:
    """Measure the checkouts in turn; return the rows with their table."""
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        urls = [word for url in stack.enter_context(upstreams()) for word in ("--upstream", url)]
        served = ("serve", "mnist", "--workers", "2", "--policy", "uncoded")
        words = {"serve, an image": served, "gateway": ("gateway", *urls)}
        processes = {
            (subject, str(place)): stack.enter_context(command(place, *words[subject]))
            for subject in words
            for place in tree
        }
        for number in range(ROUNDS + 1):
            for place, process in processes.items():
                seconds = cost(process, place[0], requests)
                if number:  # the first round warms up
                    found.setdefault(place, []).append(seconds)
    rows = [
        {
            **{"of": subject, "checkout": place, "ms of a core": statistics.median(values)},
            **{"from": min(values), "to": max(values)},
        }
        for (subject, place), values in found.items()
    ]
    return {"rows": rows, "table": tables.markdown(DataFrame(rows), FORMATS).strip()}
