"""The HTTP server that tests put behind what they test: every byte of it is theirs to decide."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, Self


class Request(NamedTuple):
    """What an upstream was sent."""

    start: str
    fields: dict[str, str]
    body: bytes
    head: bytes
    number: int = 0
    """How many a toy got before."""

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


def saying(
    body: bytes | None = b"ok", status: int = 200, fields: str = "", after: float = 0.0
) -> Handler:
    """Return a handler that says the same to all, after some seconds; with None, it echoes."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(after)
        own = request.body or request.path.encode()
        return answer(own if body is None else body, status, fields)

    return serve


class Upstream:
    """A server of HTTP/1.1; what a handler returns is written, None closes the connection.

    Attributes:
        requests: that it was sent, but for probes.
        seen: by the id that `x-id` gives.
    """

    def __init__(self, handler: Handler = echo, host: str = "127.0.0.1") -> None:
        self.handler, self.host = handler, host
        self.requests: list[Request] = []
        self.seen: Counter[str] = Counter()
        self.writers: set[asyncio.StreamWriter] = set()
        self.probes = 0
        self.is_ready = True
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.serve, self.host, self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.server.close()
        await asyncio.sleep(0)  # what was accepted just now is among the writers then
        for writer in list(self.writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while True:
                request = await read_request(reader)
                found = await self.respond(request, reader, writer)
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

    async def respond(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        if request.path.endswith(("/v2/health/ready", "/healthz")):
            self.probes += 1
            return answer(b"", 200 if self.is_ready else 503)
        self.requests.append(request)
        self.seen[request.fields.get("x-id", "")] += 1
        return await self.handler(request, writer)


class Raw(Upstream):
    """A server whose connections a function has to itself."""

    def __init__(
        self, connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]
    ) -> None:
        super().__init__()
        self.connected = connected

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self.connected(reader, writer)


class Reply(NamedTuple):
    """What a toy answers, whole or part by part."""

    body: bytes | AsyncIterator[bytes]
    status: int = 200
    type: str = "text/plain"
    delay: float = 0.0


class Toy(Upstream):
    """A server that answers as a function says, probes as well, until its client leaves.

    Attributes:
        handle: the function.
        cut: how many connections clients closed before the answer's end.
    """

    def __init__(self, handle: Callable[[Request], Reply]) -> None:
        super().__init__()
        self.handle, self.cut = handle, 0

    async def respond(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        request = request._replace(number=len(self.requests))
        self.requests.append(request)
        gone = asyncio.ensure_future(reader.read(1))  # clients here do not pipeline
        replying = asyncio.ensure_future(self._reply(self.handle(request), writer))
        try:
            await asyncio.wait((gone, replying), return_when=asyncio.FIRST_COMPLETED)
            if not replying.done():
                self.cut += 1
                return None
            replying.result()
            return b""
        finally:
            replying.cancel()
            gone.cancel()
            await asyncio.gather(gone, replying, return_exceptions=True)

    async def _reply(self, reply: Reply, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(reply.delay)
        kind = f"Content-Type: {reply.type}\r\n"
        if isinstance(reply.body, bytes):
            writer.write(answer(reply.body, reply.status, kind))
            await writer.drain()
            return
        head = f"HTTP/1.1 {reply.status} X\r\n{kind}Transfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        async for chunk in reply.body:
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


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
