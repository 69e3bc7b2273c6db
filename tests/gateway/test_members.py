"""Several gateways, each a process, that decide as one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Running, running
from codedinvnet.common.errors import UserError
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port
from tests.processes import needs_proc, survivors
from tests.upstream import Upstream, saying

PATIENCE = 20.0


@asynccontextmanager
async def gateways(
    upstreams: list[str], folder: Path, *options: list[str]
) -> AsyncIterator[list[Running]]:
    """Run a gateway for each list of options."""
    urls = [f"--upstream={url}" for url in upstreams]
    with ExitStack() as stack:

        def start(number: int) -> Running:
            command = (sys.executable, "-m", "codedinvnet", "gateway", *urls, *options[number])
            return stack.enter_context(running(*command, log=folder / f"log{number}"))

        try:
            yield [await asyncio.to_thread(start, number) for number in range(len(options))]
        finally:
            await asyncio.to_thread(stack.close)


def together(count: int, *more: str) -> list[list[str]]:
    """Return the options of gateways that decide as one."""
    ports = [free_port() for _ in range(count)]
    members = ",".join(f"127.0.0.1:{port}" for port in ports)
    own = ["--port", "0", "--members", members, *more]
    return [[*own, "--member-port", str(port)] for port in ports]


@asynccontextmanager
async def servers(count: int) -> AsyncIterator[list[Upstream]]:
    async with AsyncExitStack() as stack:
        made = [Upstream(saying(None, after=0.01)) for _ in range(count)]
        yield [await stack.enter_async_context(one) for one in made]


async def status(url: str) -> dict[str, Any]:
    client = HttpClient(parse_origin(url))
    try:
        found = await client.ask("GET", "/codedinvnet/status", 2.0)
    finally:
        client.close()
    members: dict[str, Any] = json.loads(found.body)["members"]
    return members


async def until(urls: list[str], holds: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Wait until these gateways are up, and something holds of what they say of one another."""
    end, found = time.monotonic() + PATIENCE, list[dict[str, Any]]()
    while time.monotonic() < end:
        with suppress(OSError):
            found = [await status(url) for url in urls]
            if holds(found):
                return
        await asyncio.sleep(0.05)
    raise AssertionError(found)


def two_free_ports() -> int:
    """Return a port that is free, as is the next."""
    while True:
        port = free_port()
        with suppress(OSError), socket.socket() as beside:
            beside.bind(("127.0.0.1", port + 1))
            return port


def decide_for(count: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda found: sorted(each["decides_for"] for each in found)[-2:] == [0, count]


@needs_proc
@pytest.mark.timeout(40)
@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_member_that_decides_is_lost_under_load(harm: int, tmp_path: Path) -> None:
    async with (
        servers(4) as upstreams,
        gateways([one.url for one in upstreams], tmp_path, *together(3)) as processes,
    ):
        urls = [process.address for process in processes]
        await until(urls, decide_for(3))
        (leader,) = [url for url in urls if (await status(url))["decides"]]
        pid = next(process.pid for process in processes if process.address == leader)
        answered: dict[int, bytes] = {}
        clients = [HttpClient(parse_origin(url)) for url in urls]

        async def ask(number: int) -> None:
            client, path = clients[number % 3], f"/{number}"
            if number % 2:  # it must not be repeated
                body, fields = b"%d" % number, [("x-id", str(number))]
                found = await client.ask("POST", path, 15.0, body, fields)
            else:
                found = await client.ask("GET", path, 15.0)
            assert found.status == 200, found.body
            answered[number] = found.body

        asks = []
        for number in range(600):
            asks.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(0.004)
            if number == 200:
                os.kill(pid, harm)
            if number == 500 and harm == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        ends = await asyncio.gather(*asks, return_exceptions=True)
        if harm == signal.SIGSTOP:
            await until(urls, decide_for(3))  # it is the oldest: the others follow it again
        else:
            await until([url for url in urls if url != leader], decide_for(2))
        for client in clients:
            client.close()
    lost = {n for n, end in enumerate(ends) if end is not None}
    assert harm == signal.SIGKILL or not lost, ends
    assert all(urls[number % 3] == leader for number in lost), [ends[n] for n in lost]
    for number, body in answered.items():
        assert body == (b"%d" if number % 2 else b"/%d") % number
    seen = sum((one.seen for one in upstreams), Counter())
    del seen[""]  # what may be repeated
    assert max(seen.values()) == 1, "a request was sent twice that must not be"


@pytest.mark.timeout(60)
async def test_members_that_differ_do_not_join(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-of-all-members")
    first, second, third = together(3)
    first += ["--member-token-file", str(token)]
    second += ["--member-token-file", str(token), "--slots", "3"]
    reasons = ("upstreams, routes or rules", "token")

    def told(found: list[Any]) -> str:
        return " ".join(reason for each in found for reason in each["refused"].values())

    async with (
        servers(1) as upstreams,
        gateways([upstreams[0].url], tmp_path, first, second, third) as processes,
    ):
        urls = [process.address for process in processes]
        # whoever is asked first may know only one of the other two
        await until(urls, lambda found: all(reason in told(found) for reason in reasons))
        found = [await status(url) for url in urls]
    assert all(each["decides_for"] == 1 for each in found)


@needs_proc
@pytest.mark.timeout(60)
async def test_processes_share_a_port_and_start_again(tmp_path: Path) -> None:
    port, admin = free_port(), two_free_ports()
    own = ["--port", str(port), "--admin-port", str(admin), "--processes", "2"]
    urls = [f"http://127.0.0.1:{admin + number}" for number in range(2)]
    async with (
        servers(2) as upstreams,
        gateways([one.url for one in upstreams], tmp_path, own) as (supervisor,),
    ):
        await until(urls, decide_for(2))
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        victim, *_ = map(int, children.read_text().split())
        os.kill(victim, signal.SIGKILL)
        assert not await asyncio.to_thread(survivors, [victim])
        await asyncio.sleep(0.1)  # its threads end after it, and hold its socket until then
        for number in range(40):
            client = HttpClient(parse_origin(f"http://127.0.0.1:{port}"))
            assert (await client.ask("GET", f"/{number}", 10.0)).body == b"/%d" % number
            client.close()
        await asyncio.sleep(2.0)
        await until(urls, decide_for(2))
    assert supervisor.process.returncode == 0


@needs_proc
async def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    admin = two_free_ports()
    own = ["--port", str(free_port()), "--admin-port", str(admin), "--processes", "2"]
    urls = [f"http://127.0.0.1:{admin + number}" for number in range(2)]
    async with servers(1) as (upstream,), gateways([upstream.url], tmp_path, own) as (supervisor,):
        await until(urls, decide_for(2))
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        pids = list(map(int, children.read_text().split()))
        assert len(pids) == 2
        supervisor.process.kill()
        assert not await asyncio.to_thread(survivors, pids)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"members": "a:1"}, "--member-port"),
        ({"members": "a", "member_port": 7100}, "HOST:PORT"),
        ({"members": "10.0.0.1:1,10.0.0.2:1", "member_port": 1}, "--member-token-file"),
        ({"processes": 2}, "--admin-port"),
        ({"members": "a:1", "member_port": 1, "processes": 2, "admin_port": 1}, "--processes"),
        ({"members": "a:1", "member_port": 1, "fallback": "http://b:1"}, "fallback"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        GatewayOptions(upstream=("http://127.0.0.1:1",), **options).check()
