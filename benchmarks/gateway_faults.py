"""`python -m benchmarks gateway-faults`: five upstreams, one after another of which is harmed.

All upstreams are addresses of one name, as in a headless service, on this machine's 127.0.0.2 to 6.
Their model waits and then computes next to nothing, so that two cores are enough for all. The same
requests come twice, without faults and with them. Then more comes than the upstreams can do,
through the gateway and straight to them. The report says during which harm the slowest requests
came, and what share of the processors was busy: where all are, capacity is theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.errors import UserError
from codedinvnet.evaluation.load import Ended, Load, percentiles
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import run_gateway
from codedinvnet.net.client import Answer, HttpClient, parse_origin
from codedinvnet.net.resolve import Address, Resolver, literal
from codedinvnet.processes import Running, descendants, free_port, processor_time, running
from codedinvnet.protocol.http import parse_response, render_request
from codedinvnet.protocol.messages import HEADER_LENGTH, InferRequest
from codedinvnet.provenance import describe_machine
from codedinvnet.simulation.arrivals import poisson_gaps

UPSTREAMS, MODEL, NAME = 5, "waiting", "upstreams.test"
SERVICE = 0.02
"""Seconds that the model waits for a query."""
SLOWER = 10
"""How many times as long a slow upstream takes."""
FOLDER = "CODEDINVNET_FAULTS_FOLDER"
"""The variable that names the folder in which an upstream finds what it suffers from."""
CAPACITY = UPSTREAMS / SERVICE
INFER = f"/v2/models/{MODEL}/infer"
TIMEOUT = 10.0
START_TIMEOUT = 300.0
TOLD = "p99_ms", "max_ms"
"""What is said of the requests during each harm."""
SLOWEST = 1000
"""One request of so many is among the slowest."""
CALLS = re.compile(r'codedinvnet_gateway_attempts_total\{.*upstream="([^"]+)".*\} (\S+)')


class Waiting(nn.Module):
    """Maps x to 3x + 1, and takes as long as it is told."""

    def forward(self, x: Tensor) -> Tensor:
        folder = Path(os.environ[FOLDER])
        if (folder / "broken").exists():
            raise RuntimeError("out of memory")
        time.sleep(SERVICE * (SLOWER if (folder / "slow").exists() else 1))
        return 3 * x + 1


def waiting() -> tuple[nn.Module, Tensor]:
    """Return the upstreams' model."""
    return Waiting(), torch.zeros(1, 4)


def gateway(port: int, hosts: Path, policy: str) -> None:
    """Run the gateway in this process; a file says which addresses the upstreams' name has."""

    def lookup(_: str, port: int) -> list[Address]:
        found: list[str] = json.loads(hosts.read_text())
        if not found:
            raise OSError(-2, "Name or service not known")
        return [address for host in found for address in literal(host, port)]

    upstream = (f"dns+http://{NAME}:{port}",)
    options = GatewayOptions(upstream=upstream, policy=policy, port=0, deadline_ms=5000.0)
    run_gateway(options, Resolver(lookup))


@dataclass
class Server:
    """One upstream.

    Attributes:
        host: its address.
        port: that of all.
        folder: what it suffers from.
        process: of `codedinvnet serve`.
    """

    host: str
    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its URL."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Start it; it is not ready at once."""
        self.folder.mkdir(exist_ok=True)
        options = ("--set", f"name={MODEL}", "--workers", "1", "--policy", "uncoded")
        command = [sys.executable, "-m", "codedinvnet", "serve", f"{__name__}:waiting", *options]
        command += ["--host", self.host, "--port", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=self.environment, **quiet)  # type: ignore[call-overload]

    @property
    def environment(self) -> dict[str, str]:
        """Its processes' variables."""
        return {**os.environ, FOLDER: str(self.folder), "OMP_NUM_THREADS": "1"}

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        assert self.process is not None
        for pid in (self.process.pid, *descendants(self.process.pid)):
            os.kill(pid, number)

    def kill(self) -> None:
        """End it, as a crash does."""
        if self.process is not None:
            self.process.kill()  # its workers end with it
            self.process.wait()

    @contextmanager
    def marked(self, word: str) -> Iterator[None]:
        """Let it suffer from something while the body runs."""
        (self.folder / word).touch()
        try:
            yield
        finally:
            (self.folder / word).unlink()


class Harms(list[tuple[float, str]]):
    """What was done, and when it began (`time.perf_counter`)."""

    def begin(self, name: str) -> None:
        """Take down that something begins."""
        self.append((time.perf_counter(), name))

    def of(self, due: float) -> str:
        """Return what was done when a request was due."""
        place = bisect(self, (due, "")) - 1
        return self[place][1] if place >= 0 else "nothing"

    def report(self, ends: Sequence[Ended]) -> dict[str, Any]:
        """Return p99 and the slowest during each harm, and when the slowest of all came.

        Args:
            ends: when each request was due, and its latency in ms.
        """
        times: dict[str, list[float]] = {}
        for due, latency in ends:
            times.setdefault(self.of(due), []).append(latency)
        found = {name: percentiles(each) for name, each in times.items()}
        during = {name: {key: each[key] for key in TOLD} for name, each in found.items()}
        slowest = sorted(ends, key=lambda end: -end[1])[: max(1, len(ends) // SLOWEST)]
        return {"during": during, "slowest": dict(Counter(self.of(due) for due, _ in slowest))}


async def loaded(
    urls: Sequence[str], gaps: Sequence[float], label: str, harms: Harms | None = None
) -> dict[str, Any]:
    """Send requests to servers in turn, check each answer, and report counts and percentiles."""
    sent = [np.full((1, 4), number, np.float32) for number in range(len(gaps))]
    bodies = [render_request(InferRequest({"x": x}), binary=False) for x in sent]

    def good(number: int, answer: Answer) -> bool:
        response = parse_response(answer.body, answer.field(HEADER_LENGTH) or None)
        (found,) = response.outputs.values()
        return np.array_equal(found, 3 * sent[number] + 1)

    load = Load(
        [f"{url}{INFER}" for url in urls],
        [body.data for body in bodies],
        tuple(bodies[0].headers.items()),
        TIMEOUT,
        good,
    )
    before = processor_time(os.getpid())
    found = await load.run(gaps, label)
    after = processor_time(os.getpid())
    if before is not None and after is not None:
        share = (after.busy - before.busy) / max(after.whole - before.whole, 1e-9)
        found["processors busy"] = round(share, 2)
    return found if harms is None else {**found, **harms.report(load.ended)}


async def calls(gateway_url: str) -> dict[str, float]:
    """Return how many calls the gateway has sent to each upstream."""
    async with aiohttp.ClientSession() as session, session.get(f"{gateway_url}/metrics") as reply:
        text = await reply.text()
    found: dict[str, float] = {}
    for url, value in CALLS.findall(text):
        found[url] = found.get(url, 0.0) + float(value)
    return found


async def ready(url: str) -> None:
    """Return when a server is.

    Raises:
        UserError: if it is not in time.
    """
    client, end = HttpClient(parse_origin(url)), time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if (await client.ask("GET", f"/v2/models/{MODEL}/ready", 1.0)).status == 200:
                client.close()
                return
        await asyncio.sleep(0.2)
    raise UserError(f"{url} does not start")


async def harmed(
    servers: Sequence[Server], hosts: Path, url: str, step: float, harms: Harms
) -> dict[str, float]:
    """Harm one upstream after another; return the calls that those got that were dead.

    Args:
        servers: the upstreams.
        hosts: the addresses that their name has.
        url: the gateway's.
        step: seconds for each harm, and half as many between two.
        harms: where they are taken down.
    """
    everyone = [server.host for server in servers]
    dead = {}

    async def while_dead(server: Server, seconds: float) -> float:
        await asyncio.sleep(0.4 * seconds)  # until it is found out
        before = (await calls(url)).get(server.url, 0.0)
        await asyncio.sleep(0.6 * seconds)
        return (await calls(url)).get(server.url, 0.0) - before

    await asyncio.sleep(step / 2)
    harms.begin("one stands still")
    servers[0].signal(signal.SIGSTOP)
    dead["stopped"] = await while_dead(servers[0], step)
    servers[0].signal(signal.SIGCONT)
    harms.begin("it goes on")
    await asyncio.sleep(step / 2)
    harms.begin("one is killed")
    servers[1].kill()
    dead["killed"] = await while_dead(servers[1], step / 2)
    harms.begin("it starts again")
    servers[1].start()
    await ready(servers[1].url)
    harms.begin("it is back")
    await asyncio.sleep(step / 2)
    harms.begin("one fails everything")
    with servers[2].marked("broken"):
        await asyncio.sleep(step)
    harms.begin("it fails no more")
    await asyncio.sleep(step / 2)
    harms.begin("one is slow")
    with servers[3].marked("slow"):
        await asyncio.sleep(step)
    harms.begin("it is slow no more")
    await asyncio.sleep(step / 2)
    harms.begin("the name is lost")
    hosts.write_text(json.dumps([]))  # nobody knows the name
    await asyncio.sleep(step / 2)
    harms.begin("the name has lost one")
    hosts.write_text(json.dumps(everyone[:-1]))
    await asyncio.sleep(step / 2)
    harms.begin("it has all again")
    hosts.write_text(json.dumps(everyone))
    return dead


def gateway_before(
    port: int, hosts: Path, policy: str, log: Path
) -> AbstractContextManager[Running]:
    """Run a gateway."""
    code = f"import pathlib, {__name__} as b; b.gateway({port}, pathlib.Path({str(hosts)!r}), "
    return running(sys.executable, "-c", f"{code}{policy!r})", log=log)


async def measured(
    servers: Sequence[Server], hosts: Path, log: Path, policy: str, requests: int, step: float
) -> dict[str, Any]:
    """Measure, and return the report."""
    port, rate = servers[0].port, CAPACITY / 2
    gaps = poisson_gaps(rate, requests, 0)
    harms = Harms()
    report: dict[str, Any] = {"policy": policy, "rate": rate, "capacity": CAPACITY}
    with gateway_before(port, hosts, policy, log) as gateway:
        url = gateway.address
        clean = await loaded([url], gaps, "without faults")
        harming = asyncio.create_task(harmed(servers, hosts, url, step, harms))
        before = sum((await calls(url)).values())
        faulty = await loaded([url], gaps, "with faults", harms)
        report["calls while dead"] = await harming
        sent = sum((await calls(url)).values()) - before
    report |= {"clean": clean, "faults": faulty}
    report["attempts"] = round(sent / requests, 3)
    for server in servers:
        await ready(server.url)
    over = poisson_gaps(1.2 * CAPACITY, round(requests / 5), 1)
    straight = await loaded([server.url for server in servers], over, "overload, straight")
    with gateway_before(port, hosts, policy, log) as gateway:
        url = gateway.address
        before = sum((await calls(url)).values())
        through = await loaded([url], over, "overload, through the gateway")
        sent = sum((await calls(url)).values()) - before
    attempts = round(sent / len(over), 3)
    report["overload"] = {"attempts": attempts, "through": through, "straight": straight}
    return {**report, "shown": shown(report, requests)}


def shown(report: dict[str, Any], requests: int) -> dict[str, bool]:
    """Return what the run shows."""
    clean, faults, over = report["clean"], report["faults"], report["overload"]
    late, usual = (each["p999_ms"] for each in (faults, clean))
    return {
        "nothing is lost or wrong": faults["answered"] == clean["answered"] == requests,
        "p99.9 with faults is at most 1.5 times that without": (
            late is not None and usual is not None and late <= 1.5 * usual
        ),
        "nothing is sent to the dead": not any(report["calls while dead"].values()),
        "at most 1.1 attempts a request under overload": over["attempts"] <= 1.1,
        "no less is done under overload than without the gateway": (
            over["through"]["goodput_per_s"] >= 0.98 * over["straight"]["goodput_per_s"]
        ),
    }


def run(*, quick: bool, policy: str = "auto") -> dict[str, Any]:
    """Run it all.

    Raises:
        UserError: if a server does not start.
    """
    requests, step = (1500, 1.5) if quick else (20_000, 20.0)
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder, port = Path(text), free_port()
        servers = [Server(f"127.0.0.{i + 2}", port, folder / str(i)) for i in range(UPSTREAMS)]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([server.host for server in servers]))

        async def all_of_it() -> dict[str, Any]:
            await asyncio.gather(*(ready(server.url) for server in servers))
            return await measured(servers, hosts, folder / "log", policy, requests, step)

        found = asyncio.run(all_of_it())
    return {"machine": describe_machine(), "load": os.getloadavg()[0], **found}
