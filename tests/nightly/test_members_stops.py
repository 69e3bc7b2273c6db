"""The member that decides is killed, stopped and cut off, under load: what clients see of it.

With `-s` it prints the percentiles of the second after, of members and of gateways that decide
alone. ROUNDS=20 makes it longer, and with BLOCKS=0 the upstreams have no fault of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.processes import Running, running
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.collector import sparing_collector
from codedinvnet.net.listening import free_port
from tests.gateway.test_members import decide_for, status, until
from tests.nightly.namespaces import Machine, machines
from tests.processes import needs_proc
from tests.upstream import Request, Upstream, answer

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900), needs_proc]
ROUNDS = int(os.environ.get("ROUNDS", "5"))
GATEWAYS, UPSTREAMS, RATE = 3, 4, 120.0
SERVICE = 0.01
BLOCKS = float(os.environ.get("BLOCKS", "0.01"))
"""The share of the requests that block their upstream, for 0.1 to 1 s."""
AWAY, BETWEEN = 3.0, 2.0
"""Seconds of a stop or a cut, and of peace before it."""
KILLED_FOR = 1.0
PATIENT = 2500.0
"""Milliseconds: less than a stop lasts."""
LONGEST = 1.0
"""Seconds before a kill since which requests may be with the killed one."""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def spared() -> Iterator[None]:
    """A full collection of all that pytest has would take 0.2 s."""
    with sparing_collector():
        yield


class Slow(Upstream):
    """Works on one request at a time; some block it.

    Attributes:
        asked: the number of each request that came.
    """

    def __init__(self, host: str, seed: int) -> None:
        super().__init__(self.handle, host)
        self.asked: list[int] = []
        self.turn = asyncio.Lock()
        self.chance = random.Random(seed)

    async def handle(self, request: Request, _: asyncio.StreamWriter) -> bytes:
        self.asked.append(int(request.path[1:]))
        async with self.turn:
            blocks = self.chance.random() < BLOCKS
            await asyncio.sleep(SERVICE + blocks * min(0.1 * self.chance.paretovariate(1.5), 1.0))
        return answer(request.body or request.path.encode())


class Gateway(NamedTuple):
    """Where a gateway is, and how it is started."""

    command: list[str]
    url: str
    machine: Machine | None


class Ending(NamedTuple):
    """What became of a request."""

    due: float
    gateway: int
    ms: float
    wrong: str
    lost: str


class Fleet:
    """Gateways that are processes."""

    def __init__(self, gateways: list[Gateway], log: Path, stack: ExitStack) -> None:
        self.gateways, self.log, self.stack = gateways, log, stack
        self.processes: dict[int, Running] = {}

    async def start(self, number: int) -> None:
        made = running(*self.gateways[number].command, log=self.log)
        self.processes[number] = await asyncio.to_thread(self.stack.enter_context, made)

    def signal(self, number: int, which: int) -> None:
        os.kill(self.processes[number].pid, which)

    async def harm(self, number: int, how: str) -> None:
        """Harm one, and end it."""
        machine = self.gateways[number].machine
        if how == "kill":
            self.signal(number, signal.SIGKILL)
            await asyncio.sleep(KILLED_FOR)
            await self.start(number)
        elif how == "stop":
            self.signal(number, signal.SIGSTOP)
            await asyncio.sleep(AWAY)
            self.signal(number, signal.SIGCONT)
        else:
            assert machine is not None
            machine.cut(True)
            await asyncio.sleep(AWAY)
            machine.cut(False)


def commands(places: list[Machine] | None, urls: list[str], more: list[str]) -> list[Gateway]:
    """Return the gateways: on this machine, or each on its own."""
    lines, found = [free_port() for _ in range(GATEWAYS)], []
    upstreams = [f"--upstream={url}" for url in urls]
    members = [
        f"127.0.0.1:{line}" if places is None else f"{places[number].private}:{line}"
        for number, line in enumerate(lines)
    ]
    for number, line in enumerate(lines):
        place, port = None if places is None else places[number], free_port()
        host = "127.0.0.1" if place is None else "0.0.0.0"
        own = ["--host", host, "--port", str(port), *upstreams]
        if more:
            own += [*more, "--members", ",".join(members), "--member-port", str(line)]
        program = [sys.executable, "-m", "codedinvnet", "gateway", *own]
        address = host if place is None else place.public
        command = [*(place.command if place else ()), *program]
        found.append(Gateway(command, f"http://{address}:{port}", place))
    return found


@asynccontextmanager
async def fleet(how: str, together: bool, folder: Path) -> AsyncIterator[tuple[Fleet, list[Slow]]]:
    token = folder / "token"
    token.write_text("secret-of-all-members")
    async with AsyncExitStack() as servers:
        with ExitStack() as stack:
            host, places = "127.0.0.1", None
            if how == "cut":
                host, places = stack.enter_context(machines(GATEWAYS))
            upstreams = [
                await servers.enter_async_context(Slow(host, seed)) for seed in range(UPSTREAMS)
            ]
            more = ["--member-token-file", str(token)] if together else []
            found = commands(places, [one.url for one in upstreams], more)
            made = Fleet(found, folder / "log", stack)
            try:
                for number in range(GATEWAYS):
                    await made.start(number)
                yield made, upstreams
            finally:
                await asyncio.to_thread(stack.close)


async def decider(urls: list[str]) -> int:
    """Return the member that decides for all, once there is one."""
    await until(urls, decide_for(GATEWAYS))
    (found,) = [n for n, url in enumerate(urls) if (await status(url))["decides"]]
    return found


async def load(urls: list[str], over: asyncio.Event) -> list[Ending]:
    """Send requests until it is over; each has an answer, odd ones must not be repeated."""
    clients = [HttpClient(parse_origin(url)) for url in urls]
    chance, ends = random.Random(1), list[Ending]()

    async def ask(number: int, gateway: int, due: float) -> None:
        path, body = f"/{number}", b"%d" % number if number % 2 else None
        wrong = lost = ""
        try:
            found = await clients[gateway].ask("POST" if body else "GET", path, 20.0, body)
            if found.status != 200:
                lost = f"{found.status} {found.body!r}"
            elif found.body != (body or path.encode()):
                wrong = f"{found.body!r} for {number}"
        except OSError as error:
            lost = repr(error)
        ends.append(Ending(due, gateway, 1000 * (time.monotonic() - due), wrong, lost))

    asks, due = list[asyncio.Task[None]](), time.monotonic()
    while not over.is_set():
        asks.append(asyncio.create_task(ask(len(asks), chance.randrange(len(urls)), due)))
        due += chance.expovariate(RATE)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    await asyncio.gather(*asks)
    for client in clients:
        client.close()
    return ends


@pytest.mark.parametrize("together", [True, False], ids=["members", "alone"])
@pytest.mark.parametrize("how", ["kill", "stop", "cut"])
async def test_what_clients_see(how: str, together: bool, tmp_path: Path) -> None:
    over, harmed = asyncio.Event(), list[tuple[float, float, int]]()
    async with fleet(how, together, tmp_path) as (gateways, upstreams):
        urls = [each.url for each in gateways.gateways]
        asked = asyncio.create_task(load(urls, over))
        try:
            for number in range(ROUNDS):
                victim = await decider(urls) if together else number % GATEWAYS
                await asyncio.sleep(BETWEEN)
                began = time.monotonic()
                await gateways.harm(victim, how)
                harmed.append((began, time.monotonic(), victim))
            if together:
                await decider(urls)
        finally:
            over.set()
            ends = await asked
    sent = Counter(each for one in upstreams for each in one.asked)
    twice = [number for number, count in sent.items() if count > 1 and number % 2]
    copies = sum(count - 1 for number, count in sent.items() if not number % 2)
    lost = [end for end in ends if end.lost]
    elsewhere = [
        end
        for end in lost
        if how != "kill"
        or not any(
            end.gateway == victim and at - LONGEST < end.due < back for at, back, victim in harmed
        )
    ]
    after = [
        end.ms
        for at, _, victim in harmed
        for end in ends
        if at <= end.due < at + 1 and not end.lost and (how == "cut" or end.gateway != victim)
    ]
    levels = np.percentile(after, [50, 90, 99, 99.9])
    print(
        f"\n{how}, {'members' if together else 'alone'}: {len(ends)} requests, {ROUNDS} rounds, "
        f"{sum(bool(end.wrong) for end in ends)} wrong, {len(lost)} lost, {len(elsewhere)} of them "
        f"elsewhere, {len(twice)} sent twice that must not be, {copies} "
        f"copies; the second after, {len(after)} requests, p50/p90/p99/p99.9: "
        + " / ".join(f"{level:.0f}" for level in levels)
    )
    assert not [end.wrong for end in ends if end.wrong]
    assert not elsewhere
    assert not twice
    assert levels[-1] < PATIENT, "they waited for it"
    assert copies or not BLOCKS
