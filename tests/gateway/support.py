"""Gateways in front of upstreams in this process, and their clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import RunningGateway, running
from codedinvnet.net.client import Answer, HttpClient, parse_origin
from codedinvnet.net.resolve import Resolver
from tests.observing import until as until
from tests.upstream import Handler as Handler
from tests.upstream import Request as Request
from tests.upstream import Upstream as Upstream
from tests.upstream import answer as answer
from tests.upstream import echo as echo
from tests.upstream import read_request as read_request

V2 = "/v2/models/m/infer"
INFER = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}'


class Running(NamedTuple):
    """A gateway and its upstreams."""

    gateway: RunningGateway
    upstreams: list[Upstream]
    client: HttpClient

    async def ask(
        self, method: str = "GET", path: str = "/", body: bytes | None = None, **fields: str
    ) -> Answer:
        """Send one request."""
        headers = [(name.replace("_", "-"), value) for name, value in fields.items()]
        return await self.client.ask(method, path, 20.0, body, headers)

    async def raw(self, data: bytes, closes: bool = True) -> bytes:
        """Return all that comes for some bytes, until the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.client.origin.port)
        try:
            writer.write(data)
            if closes:
                writer.write_eof()
            return await asyncio.wait_for(reader.read(), 10.0)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    @property
    def connections(self) -> float:
        """How many clients are connected."""
        assert self.gateway.admin is not None
        self.gateway.admin.update_gauges()
        return self.metric("connections")

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all labels but the given ones."""
        total = 0.0
        for family in self.gateway.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == f"codedinvnet_gateway_{name}" and labels.items() <= (
                    sample.labels.items()
                ):
                    total += sample.value
        return total


class Process(NamedTuple):
    """A gateway in a process of its own."""

    process: asyncio.subprocess.Process
    client: HttpClient
    admin: HttpClient
    """Asks on the port with the gateway's own routes."""

    async def event(self, *names: str) -> dict[str, Any]:
        """Return the next event that it logs of these."""
        assert self.process.stderr is not None
        while line := await asyncio.wait_for(self.process.stderr.readline(), 20.0):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                if found["event"] in names:
                    return found
        raise AssertionError(f"it ended without {names}")

    async def end(self) -> bytes:
        """Wait until it has ended well, and return what it logged."""
        _, events = await asyncio.wait_for(self.process.communicate(), 20.0)
        assert self.process.returncode == 0
        return events


HAND_OVER = """import fcntl, os, sys
given = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 64) for number in sys.argv[1].split()]
for number, file in enumerate(given, 3):
    os.dup2(file, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "codedinvnet", *sys.argv[2:]])
"""
"""Does what systemd does for a service with sockets."""


@asynccontextmanager
async def process(
    upstream: Upstream | None,
    *words: str,
    sockets: Mapping[str, socket.socket] | None = None,
    env: Mapping[str, str] | None = None,
    **more: Any,
) -> AsyncIterator[Process]:
    """Run a gateway as a process, with further words on its command line, and sockets by name."""
    command = [sys.executable, "-m", "codedinvnet", "gateway"]
    more["env"] = {**os.environ, **(env or {})}
    if sockets:
        files = [each.fileno() for each in sockets.values()]
        command = [sys.executable, "-c", HAND_OVER, " ".join(map(str, files)), "gateway"]
        more["env"] |= {"LISTEN_FDS": str(len(files)), "LISTEN_FDNAMES": ":".join(sockets)}
        more["pass_fds"] = files
    if upstream is not None:
        command += ["--upstream", upstream.url]
    if "--port" not in words:
        command += ["--port", "0"]
    pipe = asyncio.subprocess.PIPE
    made = await asyncio.create_subprocess_exec(
        *command, *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, **more
    )
    try:
        assert made.stdout is not None
        line = (await asyncio.wait_for(made.stdout.readline(), 20.0)).decode()
        urls = re.findall(r"https?://[^ ,]+", line)
        client, admin = (HttpClient(parse_origin(url)) for url in (urls[0], urls[-1]))
        yield Process(made, client, admin)
        client.close()
        admin.close()
    finally:
        if made.returncode is None:
            made.kill()
            await made.communicate()


@asynccontextmanager
async def gateway(
    *handlers: Handler | Upstream, resolver: Resolver | None = None, **options: Any
) -> AsyncIterator[Running]:
    """Run a gateway in front of an upstream for each handler."""
    async with AsyncExitStack() as stack:
        upstreams = [one if isinstance(one, Upstream) else Upstream(one) for one in handlers]
        for upstream in upstreams:
            if not upstream.port:
                await upstream.start()
            stack.push_async_callback(upstream.stop)
        urls = tuple(upstream.url for upstream in upstreams)
        given = {"upstream": urls, "port": 0, "deadline_ms": 5000.0, "drain_ms": 6000.0, **options}
        given.setdefault("allow_host", ("a",))
        made = await stack.enter_async_context(running(GatewayOptions(**given), resolver))
        client = HttpClient(parse_origin(made.url))
        stack.callback(client.close)
        yield Running(made, upstreams, client)
    await asyncio.sleep(0.01)
