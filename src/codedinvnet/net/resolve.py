"""Look names up on threads of our own, so that a lookup that hangs stops nobody else.

Event loops resolve names on few threads that all connections share: uvloop on four, on which it
connects as well. There a server whose name takes 20 s stopped the connections to all others.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

SECONDS = 2.0
"""For a lookup."""
MOST = 64
"""Lookups at a time; one that hangs stays among them until it ends."""
KEPT = 1.0
"""Seconds for which what was found stands."""

Address: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]
"""As `socket.getaddrinfo` returns it."""


def literal(host: str, port: int) -> list[Address]:
    """Return the address that a host is by itself; empty if it is a name."""
    try:
        kind, flags = socket.SOCK_STREAM, socket.AI_NUMERICHOST
        return [*socket.getaddrinfo(host, port, type=kind, flags=flags)]
    except socket.gaierror:
        return []


class Resolver:
    """Finds the addresses of names.

    Args:
        lookup: finds them, and may take its time.
        seconds: after which it is waited for no longer.
        most: lookups at a time.
    """

    def __init__(
        self,
        lookup: Callable[[str, int], list[Address]] | None = None,
        seconds: float = SECONDS,
        most: int = MOST,
    ) -> None:
        self._lookup, self.seconds, self.most = lookup or _lookup, seconds, most
        self._going: dict[tuple[str, int], asyncio.Future[list[Address]]] = {}
        """By name and port: whoever wants the same waits for the same lookup."""
        self._found: dict[tuple[str, int], tuple[float, list[Address]]] = {}

    async def resolve(self, host: str, port: int) -> list[Address]:
        """Return the addresses of a host.

        Raises:
            OSError: if it has none, or nobody says so in time.
        """
        found = literal(host, port)
        if found:
            return found
        loop, key = asyncio.get_running_loop(), (host, port)
        at, known = self._found.get(key, (0.0, found))
        if known and loop.time() - at < KEPT:
            return known
        going = self._going.get(key)
        if going is None:
            if len(self._going) >= self.most:
                raise OSError(f"{host}: {self.most} name lookups hang already")
            going = self._going[key] = loop.create_future()
            going.add_done_callback(lambda future: future.cancelled() or future.exception())
            work = threading.Thread(
                target=self._run, args=(loop, key), name=f"lookup of {host}", daemon=True
            )
            work.start()
        try:
            return await asyncio.wait_for(asyncio.shield(going), self.seconds)
        except asyncio.TimeoutError:
            raise OSError(f"{host}: its name was not resolved within {self.seconds:g} s") from None

    def _run(self, loop: asyncio.AbstractEventLoop, key: tuple[str, int]) -> None:
        result: list[Address] | Exception
        try:
            result = self._lookup(*key)
        except Exception as error:
            result = error
        try:
            loop.call_soon_threadsafe(self._done, loop, key, result)
        except RuntimeError:  # the loop is closed
            return

    def _done(
        self,
        loop: asyncio.AbstractEventLoop,
        key: tuple[str, int],
        result: list[Address] | Exception,
    ) -> None:
        going = self._going.pop(key)
        if going.done():
            return
        if isinstance(result, Exception):
            going.set_exception(result)
        else:
            self._found = {k: v for k, v in self._found.items() if loop.time() - v[0] < KEPT}
            self._found[key] = loop.time(), result
            going.set_result(result)


def _lookup(host: str, port: int) -> list[Address]:
    return [*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
