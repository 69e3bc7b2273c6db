"""`python -m benchmarks processor`: what a request costs the front end of serve, and the gateway.

Checkouts of this repository are measured in turn, so that an old and a new one can be compared on
one machine. Connections ask again as soon as they are answered. With `--members` it is one gateway,
two processes that share a port, and two members, of which one decides for the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from benchmarks.peers import upstreams as servers
from benchmarks.processes import Running, descendants, process_stat, running
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


def cost(address: str, pids: Sequence[int], subject: str, count: int) -> list[float]:
    """Return the milliseconds of processor time that a request takes each of some processes."""
    ticks = []
    for requests in (0, count):
        asyncio.run(ask(address, subject, requests))
        stats = [process_stat(pid) for pid in pids]
        ticks.append(np.array([int(stat[11]) + int(stat[12]) for stat in stats]))
    spent = 1000 * (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / count
    return [float(each) for each in spent]


def wait_until_one_decides(addresses: Sequence[str]) -> None:
    """Wait until one of two gateways decides for both.

    Raises:
        UserError: if none does in ten seconds.
    """
    for _ in range(100):
        sizes = []
        for address in addresses:
            with suppress(OSError), urllib.request.urlopen(f"{address}/codedinvnet/status") as got:
                sizes.append(json.load(got)["members"]["decides_for"])
        if sorted(sizes) == [0, 2]:
            return
        time.sleep(0.1)
    raise UserError("the gateways do not decide as one")


def together(requests: int) -> dict[str, Any]:
    """Measure one gateway, two processes, and two members; return the rows with their table."""
    ports, admin = [free_port(), free_port()], free_port()
    lines = ",".join(f"127.0.0.1:{port}" for port in ports)
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        urls = [f"--upstream={url}" for url in stack.enter_context(upstreams())]

        def start(*words: str) -> Running:
            made: Running = stack.enter_context(command(Path(), "gateway", *urls, *words))
            return made

        one = start()
        two = start("--processes", "2", "--admin-port", str(admin))
        first, second = (start("--members", lines, "--member-port", str(port)) for port in ports)
        wait_until_one_decides([f"http://127.0.0.1:{admin + number}" for number in range(2)])
        wait_until_one_decides([first.address, second.address])
        for number in range(ROUNDS + 1):
            (alone,) = cost(one.address, [one.pid], "gateway", requests)
            shared = cost(two.address, [two.pid, *descendants(two.pid)], "gateway", requests)
            decides, asks = cost(second.address, [first.pid, second.pid], "gateway", requests)
            if number:  # the first round warms up
                found.setdefault("one gateway", []).append(alone)
                found.setdefault("--processes 2, in sum", []).append(sum(shared))
                found.setdefault("a member that asks", []).append(asks)
                found.setdefault("the member that decides for it", []).append(decides)
    rows = [{"of": subject, **spread(values)} for subject, values in found.items()]
    return {"rows": rows, "table": tables.markdown(DataFrame(rows), FORMATS).strip()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of some rounds, and their range."""
    return {"ms of a core": statistics.median(values), "from": min(values), "to": max(values)}


def run(*, tree: Sequence[Path], requests: int, members: bool = False) -> dict[str, Any]:
    """Measure the checkouts in turn; return the rows with their table."""
    if members:
        return together(requests)
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
                (seconds,) = cost(process.address, [process.pid], place[0], requests)
                if number:  # the first round warms up
                    found.setdefault(place, []).append(seconds)
    rows = [
        {"of": subject, "checkout": place, **spread(values)}
        for (subject, place), values in found.items()
    ]
    return {"rows": rows, "table": tables.markdown(DataFrame(rows), FORMATS).strip()}
