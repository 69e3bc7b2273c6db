"""What clients see of a server that is harmed, and what the harm costs the server."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROBE_PERIOD = 0.01
"""Seconds between two health probes."""
COLUMNS: Mapping[str, str] = {
    "part": "part",
    "sent": "sent",
    "answered": "answered",
    "wrong": "wrong",
    "late": "late",
    "refused": "503",
    "server_errors": "other 5xx",
    "client_errors": "4xx",
    "lost": "lost",
    "probe_ms": "longest probe, ms",
    "memory_mib": "memory grew, MiB",
    "memory_share": "of its bound",
    "descriptors": "descriptors",
}
"""Attributes of a `Count`, as tables call them. Wrong are answers with another id or content than
the request's own. Late is a second after the deadline and more, or status 504; lost is without any
response. Descriptors are the process's open files when the part was over."""


@dataclass
class Count:
    """What clients saw of one part; see `COLUMNS`. The part reports `notes` besides."""

    part: str
    sent: int = 0
    answered: int = 0
    wrong: int = 0
    late: int = 0
    refused: int = 0
    server_errors: int = 0
    client_errors: int = 0
    lost: int = 0
    probe_ms: float = 0.0
    memory_mib: int = 0
    memory_share: float | None = None
    descriptors: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, status: int, times: int = 1) -> None:
        """Count responses by their status; 0 is none."""
        usual = "client_errors" if status < 500 else "server_errors"
        name = {200: "answered", 0: "lost", 503: "refused", 504: "late"}.get(status, usual)
        self.sent += times
        setattr(self, name, getattr(self, name) + times)


@asynccontextmanager
async def counting(
    part: str, address: str, pid: int, path: str, bound: float | None = None
) -> AsyncIterator[Count]:
    """Probe a server's health path while the body harms it; yields the count.

    Its options let the process of this pid hold `bound` MiB.
    """
    count, before = Count(part), memory(pid)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from here
    async with probing(address, path) as longest:
        yield count
        count.probe_ms = round(1000 * await longest(), 1)
    count.memory_mib = (memory(pid, "VmHWM") - before) >> 20
    count.memory_share = None if bound is None else round(count.memory_mib / bound, 2)
    count.descriptors = len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int, what: str = "VmRSS") -> int:
    """Return a process's resident bytes (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@asynccontextmanager
async def probing(address: str, path: str) -> AsyncIterator[Callable[[], Any]]:
    """Ask, from a process of its own, whether the server is alive, again and again.

    Yields a coroutine function that ends the asking and returns the seconds of the longest answer.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_probe, args=(address, path, theirs), daemon=True)
    process.start()
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, ours.recv)  # it has begun

    async def longest() -> float:
        ours.send(None)
        found: float = await loop.run_in_executor(None, ours.recv)
        return found

    try:
        yield longest
    finally:
        process.kill()
        process.join()


def _probe(address: str, path: str, stop: Connection) -> None:
    place = urlsplit(address)
    question = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    longest, stream, began = 0.0, None, 0.0
    stop.send(None)
    while not stop.poll(PROBE_PERIOD):
        began = began or time.monotonic()  # without an answer the question stands
        try:
            if stream is None:
                stream = socket.create_connection((place.hostname, place.port), timeout=30)
            stream.sendall(question)
            if not stream.recv(4096):
                raise ConnectionResetError
        except OSError:
            stream = None  # an idle connection may be closed; the next question opens another
        longest = max(longest, time.monotonic() - began)
        began = began if stream is None else 0.0
    stop.recv()
    stop.send(longest)


def long_json() -> list[bytes]:
    """Return JSON that takes long to read: 1 MiB that is valid, and 60 MiB that are not."""
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [1, 60_000],
        "data": [0.1234567890123] * 60_000,
    }
    fills = ('"sequence_id"', '"sequence_id": ', "[", '{"a":', '"\\\\', "1", "1e9,", " ")
    return [
        json.dumps({"id": "long", "inputs": [tensor]}).encode(),
        *(f'{{"inputs":[{fill * ((60 << 20) // len(fill))}'.encode() for fill in fills),
    ]


def table(counts: Sequence[Count]) -> str:
    """Return the counts for people, a column a part, and the parts' notes."""
    rows = [
        [title, *("" if getattr(c, key) is None else str(getattr(c, key)) for c in counts)]
        for key, title in COLUMNS.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(counts) + 1)]
    lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    notes = [f"{c.part}: {', '.join(f'{k} {v}' for k, v in c.notes.items())}" for c in counts]
    return "\n".join([*lines, "", *notes])
