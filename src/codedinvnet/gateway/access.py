"""The access log: a line for each request on standard output, JSON or in the combined format."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from codedinvnet.net.background import in_thread
from codedinvnet.net.logs import Quiet

if TYPE_CHECKING:
    from codedinvnet.net.http1 import RequestHead

PERIOD = 0.2
"""Seconds between two writes, so that a request costs no system call."""
MOST_HELD = 50_000
"""Lines that wait while nobody reads the log; further ones are left out."""
_full = Quiet()


class Entry:
    """What is known of a request that has ended; "" and 0: nothing.

    Attributes:
        status: that its client got; 0: none.
        size: bytes of the body of its answer.
    """

    __slots__ = (
        "address", "agent", "attempts", "identity", "method", "outcome", "referer", "route",
        "seconds", "size", "status", "target", "trace", "upstream",
    )  # fmt: skip

    def __init__(self, method: str, target: str, status: int, address: str) -> None:
        self.method, self.target, self.status, self.address = method, target, status, address
        self.agent = self.referer = self.identity = self.outcome = self.route = self.upstream = ""
        self.seconds, self.size, self.attempts, self.trace = 0.0, 0, 0, ""


def as_json(entry: Entry, now: float) -> str:
    """Return a line with all fields that are known."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    fields = {
        "time": moment, "client": entry.address, "method": entry.method, "path": entry.target,
        "status": entry.status, "outcome": entry.outcome, "bytes": entry.size,
        "ms": round(1000 * entry.seconds, 1), "route": entry.route, "upstream": entry.upstream,
        "attempts": entry.attempts, "request_id": entry.identity, "trace_id": entry.trace,
        "user_agent": entry.agent, "referer": entry.referer,
    }  # fmt: skip
    return json.dumps({name: value for name, value in fields.items() if value not in ("", None)})


def as_combined(entry: Entry, now: float) -> str:
    """Return a line in the combined format of Apache and nginx; 499 if the client left."""
    moment = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now))
    line = f"{entry.method} {_plain(entry.target)} HTTP/1.1"
    agent, referer = _plain(entry.agent) or "-", _plain(entry.referer) or "-"
    address, status = _plain(entry.address) or "-", entry.status or 499
    return f'{address} - - [{moment}] "{line}" {status} {entry.size} "{referer}" "{agent}"'


def _plain(text: str) -> str:
    """Return text without what would end a field or a line."""
    return "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\x{ord(c):02x}" for c in text)


FORMATS: dict[str, Callable[[Entry, float], str]] = {"json": as_json, "combined": as_combined}


class AccessLog:
    """Collects lines, and writes them now and then.

    Args:
        name: of the format.
    """

    def __init__(self, name: str) -> None:
        self._format = FORMATS[name]
        self._entries: list[tuple[Entry, float]] = []
        self._last: RequestHead | None = None

    def replied(self, head: RequestHead, status: int, address: str) -> None:
        """Take in an answer of the gateway's own, unless it is that to a call."""
        if head is not self._last:
            method, target = head.method.decode("latin-1"), head.target[:200].decode("latin-1")
            self.add(Entry(method, target, status, address), head)

    def add(self, entry: Entry, head: RequestHead | None) -> None:
        """Take in a request that has ended."""
        self._last = head
        if len(self._entries) >= MOST_HELD:
            _full.log("access log is full", logging.WARNING, reason="nobody reads it")
            return
        if head is not None:
            entry.agent = head.known.get(b"user-agent", b"")[:200].decode("latin-1")
            entry.referer = head.known.get(b"referer", b"")[:200].decode("latin-1")
        self._entries.append((entry, time.time()))

    async def follow(self) -> None:
        """Write what has come again and again, for ever."""
        while True:
            await asyncio.sleep(PERIOD)
            if self._entries:
                await in_thread(self.flush)

    def flush(self) -> None:
        """Write what has come."""
        entries, self._entries = self._entries, []
        text = "".join(f"{self._format(entry, now)}\n" for entry, now in entries)
        sys.stdout.write(text)
        sys.stdout.flush()
