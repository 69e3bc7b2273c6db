"""The HTTP server that tests put behind what they test: every byte of it is theirs to decide."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple


class Request(NamedTuple):
    """What an upstream was sent."""

    start: str
    fields: dict[str, str]
    body: bytes
    head: bytes

    @property
    def method(self) -> str:
        return self.start.split(" ")[0]

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

    async def __aenter__(self) -> Upstream:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
