"""Look names up on threads of our own, so that a lookup that hangs delays no other.

Event loops resolve names on few threads that all connections share: uvloop on four, on which it
connects as well. There a server whose name takes 20 s stopped the connections to all others.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

from codedinvnet.net.background import apart

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
            OSError: if it has none, or the lookup takes too long.
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
            going = self._going[key] = apart(lambda: self._lookup(host, port), f"lookup of {host}")
            going.add_done_callback(lambda _: self._going.pop(key))
        try:
            found = await asyncio.wait_for(asyncio.shield(going), self.seconds)
        except TimeoutError:
            raise OSError(f"{host}: its name was not resolved within {self.seconds:g} s") from None
        now = loop.time()
        self._found = {k: v for k, v in self._found.items() if now - v[0] < KEPT}
        self._found[key] = now, found
        return found


def _lookup(host: str, port: int) -> list[Address]:
    return [*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
