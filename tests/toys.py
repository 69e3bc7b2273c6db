"""Toy upstreams: HTTP/1.1 servers in the test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NamedTuple, TypeAlias


class Request(NamedTuple):
    method: str
    path: str
    body: bytes
    number: int
    """How many the server got before."""


class Reply(NamedTuple):
    body: bytes | AsyncIterator[bytes]
    status: int = 200
    type: str = "text/plain"
    delay: float = 0.0


Handler: TypeAlias = Callable[[Request], Reply]


class Toy:
    """A server that answers as a function says.

    Attributes:
        seen: the bodies and paths of all requests.
        cut: how many connections clients closed before the answer's end.
    """

    def __init__(self, handle: Handler) -> None:
        self.handle = handle
        self.seen: list[Request] = []
        self.cut = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Toy:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def kill(self) -> None:
        """Refuse connections, and reset those that there are."""
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self._one(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {
            name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split()
        request = Request(method, path, body, len(self.seen))
        self.seen.append(request)
        closed = asyncio.ensure_future(reader.read(1))  # clients here do not pipeline
        answer = asyncio.ensure_future(self._answer(self.handle(request), writer))
        try:
            await asyncio.wait((closed, answer), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.cut += 1
                raise ConnectionError
            answer.result()
        finally:
            answer.cancel()
            closed.cancel()
            await asyncio.gather(closed, answer, return_exceptions=True)

    async def _answer(self, reply: Reply, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(reply.delay)
        head = f"HTTP/1.1 {reply.status} X\r\ncontent-type: {reply.type}\r\n"
        if isinstance(reply.body, bytes):
            head += f"content-length: {len(reply.body)}\r\n\r\n"
            writer.write(head.encode() + reply.body)
            await writer.drain()
            return
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        async for chunk in reply.body:
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
