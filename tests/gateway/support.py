"""Upstreams in this process whose every byte a test decides, gateways in front of them, clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import RunningGateway, running
from codedinvnet.net.client import Answer, HttpClient, parse_origin
from codedinvnet.net.resolve import Resolver

V2 = "/v2/models/m/infer"
INFER = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}'


class Request(NamedTuple):
    """What an upstream was sent."""

    start: str
    fields: dict[str, str]
    body: bytes
    head: bytes

    @property
    def path(self) -> str:
        return self.start.split(" ")[1]


def answer(body: bytes = b"ok", status: int = 200, fields: str = "") -> bytes:
    """Return a whole answer."""
    return b"HTTP/1.1 %d Fine\r\nContent-Length: %d\r\n%b\r\n%b" % (
        status, len(body), fields.encode(), body
    )  # fmt: skip


Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[bytes | None]]


async def echo(request: Request, writer: asyncio.StreamWriter) -> bytes:
    """Answer with the request's own body, or path."""
    return answer(request.body or request.path.encode())


class Upstream:
    """A server of HTTP/1.1; what a handler returns is written, None closes the connection.

    Attributes:
        requests: that it was sent, but for probes.
        seen: by the id that `x-id` gives.
    """

    def __init__(self, handler: Handler = echo) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.seen: Counter[str] = Counter()
        self.writers: set[asyncio.StreamWriter] = set()
        self.probes = 0
        self.is_ready = True
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while True:
                request = await read_request(reader)
                if request.path.endswith(("/v2/health/ready", "/healthz")):
                    self.probes += 1
                    found: bytes | None = answer(b"", 200 if self.is_ready else 503)
                else:
                    self.requests.append(request)
                    self.seen[request.fields.get("x-id", "")] += 1
                    found = await self.handler(request, writer)
                if found is None:
                    break
                writer.write(found)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except RuntimeError:  # as uvloop says that a connection is closed
            assert writer.transport.is_closing()
        finally:
            self.writers.discard(writer)
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    start, *lines = head[:-4].decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    fields = {name.lower(): value.strip() for name, value in pairs}
    body = b""
    if "content-length" in fields:
        body = await reader.readexactly(int(fields["content-length"]))
    elif fields.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            name, value = line.decode().split(":", 1)
            fields["trailer-" + name.lower()] = value.strip()
    return Request(start, fields, body, head)


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
        given = {"upstream": urls, "port": 0, "deadline_ms": 5000.0, **options}
        made = await stack.enter_async_context(running(GatewayOptions(**given), resolver))
        client = HttpClient(parse_origin(made.url))
        stack.callback(client.close)
        yield Running(made, upstreams, client)
    await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not come about"
        await asyncio.sleep(0.005)
