"""A simulated server of a language model, with slots and a cache of prefixes.

Run as `python -m benchmarks.engines SPEC`, where SPEC is the JSON of an `Engine`. It takes time for
the bytes of a prompt that it has not cached, then sends a token now and then. When its client
leaves it stops, as vLLM does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

BLOCK = 64
"""Bytes of a block of the cache: about 16 tokens, as vLLM's."""
SECONDS = 30e-6
"""Of prefill, for a byte: about 8,000 tokens a second."""
TOKENS, GAP = 10, 0.015
"""Tokens of an answer, and the seconds from one to the next."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n"
STREAM = HEAD % (b"text/event-stream", b"transfer-encoding: chunked\r\n")


@dataclass
class Engine:
    """What a process does.

    Attributes:
        port: of 127.0.0.1.
        slots: requests that it computes at once.
        factor: how many times as long as SECONDS it takes.
        pause: further seconds of each prefill.
        capacity: bytes of its cache.
    """

    port: int
    slots: int = 2
    factor: float = 1.0
    pause: float = 0.0
    capacity: int = 4 << 20
    prefill: float = field(default=0.0, init=False)
    """Seconds that what was computed takes on a sound server."""

    def __post_init__(self) -> None:
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.free = asyncio.Semaphore(self.slots)

    async def serve(self) -> None:
        """Serve until the process is ended."""
        await asyncio.start_server(self._connected, "127.0.0.1", self.port, backlog=1024)
        print("ready", flush=True)
        await asyncio.Event().wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                _, _, after = head.partition(b"content-length:")
                body = await reader.readexactly(int(after.split(b"\r\n")[0])) if after else b""
                if body:
                    await self._answer(json.loads(body), reader, writer)
                else:
                    told = json.dumps({"prefill": self.prefill, "data": [{"id": "m"}]}).encode()
                    length = b"content-length: %d\r\n" % len(told)
                    writer.write(HEAD % (b"application/json", length) + told)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Stream an answer, unless its client leaves."""
        work = asyncio.ensure_future(self._stream(request, writer))
        gone = asyncio.ensure_future(reader.read(1))  # a client that asks again waits for the end
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        await asyncio.wait((gone,))  # or the next request could not be read
        if not work.done():
            work.cancel()
            raise ConnectionError
        await work

    async def _stream(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        keys = list(blocks(text_of(request)))
        async with self.free:
            await self._prefill(keys)
            writer.write(STREAM)
            for number in range(TOKENS):
                end = "stop" if number + 1 == TOKENS else None
                delta = {"content": f"{request['user']} "}
                event = {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
                data = b"data: %b\n\n" % json.dumps(event).encode()
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                if number + 1 < TOKENS:
                    await asyncio.sleep(GAP)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def _prefill(self, keys: list[int]) -> None:
        """Compute what is not cached, block by block."""
        known = next((n for n, key in enumerate(keys) if key not in self.cache), len(keys))
        loop = asyncio.get_running_loop()
        began, pace = loop.time(), BLOCK * SECONDS * self.factor
        done = 0
        try:
            await asyncio.sleep(self.pause + (len(keys) - known) * pace)
            done = len(keys)
        except asyncio.CancelledError:
            done = known + int(max(0.0, loop.time() - began - self.pause) / pace)
            raise
        finally:
            self.prefill += max(0, done - known) * BLOCK * SECONDS
            for key in keys[:done]:
                self.cache[key] = None
                self.cache.move_to_end(key)
            while len(self.cache) * BLOCK > self.capacity:
                self.cache.popitem(last=False)


def text_of(request: dict[str, Any]) -> bytes:
    """Return a request's prompt."""
    return "".join(message["role"] + message["content"] for message in request["messages"]).encode()


def blocks(text: bytes) -> Iterator[int]:
    """Yield a key for each prefix of whole blocks."""
    key = 0
    for at in range(0, len(text) - BLOCK + 1, BLOCK):
        key = zlib.crc32(text[at : at + BLOCK], key)
        yield key


def command(engine: Engine) -> list[str]:
    """Return the command that runs an engine."""
    words = {key: value for key, value in asdict(engine).items() if key != "prefill"}
    return [sys.executable, "-m", "benchmarks.engines", json.dumps(words)]


if __name__ == "__main__":
    asyncio.run(Engine(**json.loads(sys.argv[1])).serve())
