"""Sockets that whoever starts the gateway keeps: one gateway replaces another without a refusal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port
from tests.gateway.support import HAND_OVER, INFER, process
from tests.processes import needs_proc
from tests.upstream import Request, Upstream, answer

pytestmark = [pytest.mark.timeout(60), needs_proc]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def load(url: str, ends: Callable[[], bool], found: Counter[object]) -> None:
    """Send requests, every other on a connection of its own, and count what comes of them."""
    kept, number = HttpClient(parse_origin(url)), 0
    while not ends():
        number += 1
        client = kept if number % 2 else HttpClient(parse_origin(url))
        try:
            found[(await client.ask("POST", "/x", 30.0, INFER)).status] += 1
        except OSError as error:
            found[repr(error)] += 1
        if client is not kept:
            client.close()
        await asyncio.sleep(0.02)
    kept.close()


async def status(url: str, path: str) -> int:
    client = HttpClient(parse_origin(url))
    try:
        return (await client.ask("GET", path, 5.0)).status
    finally:
        client.close()


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_gateway_is_replaced_without_a_lost_request(processes: int) -> None:
    finished, done = asyncio.Event(), False

    async def handle(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if request.path == "/stream":
            writer.write(CHUNKED)
            await finished.wait()
            return b"1\r\ny\r\n0\r\n\r\n"
        return answer(request.body)

    main, found = listening(), Counter[object]()
    sockets = {"gateway.socket": main}
    words = ["--processes", str(processes), "--admin-port", str(free_port())]
    if processes == 1:
        sockets["admin"] = listening()
        words = []
    async with Upstream(handle) as upstream, process(upstream, *words, sockets=sockets) as first:
        assert parse_origin(url_of(main)).port == first.client.origin.port
        loads = [asyncio.create_task(load(url_of(main), lambda: done, found)) for _ in range(8)]
        stream = asyncio.create_task(first.client.ask("GET", "/stream", 30.0))
        while not any(request.path == "/stream" for request in upstream.requests):
            await asyncio.sleep(0.01)
        before = sum(found.values())
        first.process.terminate()
        await first.event("draining")
        if processes == 2:  # nobody answers meanwhile: clients wait
            finished.set()
            await first.end()
        async with process(upstream, *words, sockets=sockets) as second:
            while sum(found.values()) < before + 200:
                await asyncio.sleep(0.01)
            for _ in range(10):  # on connections of their own
                assert await status(url_of(sockets.get("admin", main)), "/readyz") == 200
            finished.set()
            assert (await stream).body == b"xy"
            done = True
            await asyncio.gather(*loads)
            second.process.terminate()
            await second.end()
        if processes == 1:
            await first.end()
    for each in sockets.values():
        each.close()
    assert set(found) == {200}


async def test_what_a_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        loop = asyncio.get_running_loop()

        async def told() -> str:
            return (await asyncio.wait_for(loop.sock_recv(manager, 4096), 20.0)).decode()

        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        async with Upstream() as upstream, process(upstream, env=env) as one:
            assert await told() == "READY=1"
            one.process.send_signal(signal.SIGHUP)
            assert (await told()).startswith("RELOADING=1\nMONOTONIC_USEC=")
            assert await told() == "READY=1"
            one.process.terminate()
            assert await told() == "STOPPING=1"
            await one.end()


async def test_sockets_of_another_process_are_left_alone() -> None:
    env = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    async with Upstream() as upstream, process(upstream, env=env) as one:
        assert (await one.client.ask("POST", "/x", 5.0, INFER)).body == INFER
        one.process.terminate()
        await one.end()


def test_sockets_that_no_server_listens_on_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "socket"))
        other.listen()
        words = [HAND_OVER, str(other.fileno()), "gateway", "--upstream", "http://a:1"]
        ended = subprocess.run(
            [sys.executable, "-c", *words],
            env={**os.environ, "LISTEN_FDS": "1"},
            pass_fds=[other.fileno()],
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 2
    assert "TCP address" in ended.stderr
