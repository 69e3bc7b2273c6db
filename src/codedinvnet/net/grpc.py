"""gRPC, if it is installed: settings, calls under way, turns to read messages, certificates."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote

from codedinvnet.common.errors import UserError
from codedinvnet.net.listening import allow_files
from codedinvnet.net.logs import Quiet
from codedinvnet.net.memory import Memory
from codedinvnet.net.server import HEAD_TIMEOUT, KEEP_ALIVE, STRANGERS, SWEEP, UNREAD
from codedinvnet.net.tls import Certificate, Renewal

try:
    import grpc
except ImportError as error:
    raise UserError("gRPC needs an extra: pip install 'codedinvnet[grpc]'") from error

__all__ = ["Calls", "Turns", "grpc", "renewed_credentials", "server_settings", "settings"]

WINDOW = 1 << 16
"""Bytes that gRPC takes of a message that is not read yet."""
FEWEST_CALLS, MOST_CALLS = 64, 4096
"""Calls at once, whatever their size."""
PATIENCE = 1.0
"""Seconds for a message once its turn has come, while other calls wait for theirs."""
LONGEST_UNREAD = 10.0
"""Seconds for which a client may leave its answer unread while calls or memory are short."""
FILES = 4
"""One file of so many is for connections over gRPC."""
INT_MAX = 2**31 - 1
"""The largest number that an option of gRPC may be."""


def settings(**values: int) -> tuple[tuple[str, int], ...]:
    """Return settings of a channel or server as gRPC takes them."""
    return tuple((f"grpc.{name}", value) for name, value in values.items())


def server_settings(most_message: int) -> dict[str, int]:
    """Return the settings of a server.

    gRPC takes what a client sends of a message before it is read as a window, and would widen it.
    """
    return {
        "max_send_message_length": -1,
        "max_receive_message_length": min(most_message, INT_MAX),
        "http2.lookahead_bytes": WINDOW,
        "http2.bdp_probe": 0,
        "so_reuseport": 0,
        "server_handshake_timeout_ms": round(1000 * HEAD_TIMEOUT),
        "max_connection_idle_ms": round(1000 * KEEP_ALIVE),
        "max_allowed_incoming_connections": max(1, allow_files() // FILES),
        "keepalive_time_ms": round(1000 * UNREAD),
        "keepalive_timeout_ms": round(1000 * UNREAD),
    }


def renewed_credentials(certificate: Certificate) -> Any:
    """Return a server's credentials: each connection begins with what the files have then."""

    def configuration() -> Any:
        pair = (certificate.key.read_bytes(), certificate.chain.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair])

    found: list[Any] = []
    renewal = Renewal(certificate, lambda: found.append(configuration()), "gRPC")

    def news() -> Any:  # called in threads of gRPC's
        renewal.look()
        return found.pop() if found else None

    return grpc.dynamic_ssl_server_credentials(configuration(), news)


class Calls:
    """The calls of a server, with bounds for clients that don't read their answers.

    gRPC keeps a call until its client has the answer, and can't end it before; so the client's
    connection is closed.

    Args:
        memory: counts answers until clients have them.
    """

    closed = Quiet()
    """Logs connections that are closed."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.most = min(max(FEWEST_CALLS, memory.most // WINDOW), MOST_CALLS)
        self._known: dict[Any, float] = {}
        self._refused: dict[Any, float] = {}
        """When their answers began; infinity before."""
        self._timer: asyncio.TimerHandle | None = None

    def admit(self, context: Any, is_known: bool) -> bool:
        """Count a call until its client has the answer.

        Args:
            context: the call's.
            is_known: whether its client has shown the token, if there is one; calls that are
                answered at once, or refused, don't take the place of those of clients that have.

        Returns:
            whether there is room.
        """
        has_room = is_known and len(self._known) < self.most
        calls = self._known if has_room else self._refused
        calls[context] = math.inf if has_room else time.monotonic()
        context.add_done_callback(lambda _: calls.pop(context, None))
        if len(self._refused) > max(FEWEST_CALLS, self.most // STRANGERS):
            oldest = list(self._refused)[: len(self._refused) // 2]
            for each in oldest:
                del self._refused[each]
            self._hang_up(oldest)
        self._watch()
        return has_room or not is_known

    def answered(self, context: Any, size: int = 0) -> None:
        """Count an answer, of which gRPC makes a copy, until the client has it."""
        if context in self._known:
            self._known[context] = time.monotonic()
        self.memory.take(2 * size)
        context.add_done_callback(lambda _: self.memory.give(2 * size))

    async def abort(self, context: Any, code: Any, why: str, trailing: Any = ()) -> None:
        """Answer with an error, as gRPC does."""
        self.answered(context)
        await context.abort(code, why, trailing)

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Close the connections of clients that read too slowly."""
        self._timer, now = None, time.monotonic()
        late = [each for each, since in self._refused.items() if now - since > UNREAD]
        if self.memory.is_short or 4 * len(self._known) >= 3 * self.most:
            known = self._known.items()
            late += [each for each, since in known if now - since > LONGEST_UNREAD]
        self._hang_up(late)
        if self._known or self._refused:
            self._watch()

    def _hang_up(self, contexts: Iterable[Any]) -> None:
        peers = {_address(each.peer()) for each in contexts}
        if peers:
            reason = "their clients don't read the answers"
            self.closed.log("gRPC connections closed", logging.WARNING, reason=reason)
            hang_up(peers)


def _address(peer: str) -> tuple[str, int]:
    """Return the address in gRPC's name of a client, such as ipv6:%5B::1%5D:80."""
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    return str(ip_address(host.strip("[]").partition("%")[0])), int(port)


def hang_up(peers: set[tuple[str, int]]) -> None:
    """Close connections with these addresses, whoever of this process has opened them."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    host, port = copy.getpeername()[:2]
                    address = ip_address(host.partition("%")[0])
                    if (str(getattr(address, "ipv4_mapped", None) or address), port) in peers:
                        copy.shutdown(socket.SHUT_RDWR)


class Turns:
    """Turns to read clients' messages, which gRPC takes as a whole, telling of no progress.

    Calls wait with their clients: of a message that is not read, `WINDOW` bytes are taken. The
    newest has the next turn, since the older ones may send nothing at all. One whose message takes
    longer than PATIENCE loses its turn if another waits.

    Args:
        count: messages that are read at once.
        memory: where a message is counted while it is read.
        size: of the longest message.
    """

    def __init__(self, count: int, memory: Memory, size: int) -> None:
        self.memory, self.size = memory, size
        self._free = count
        self._waiting: list[asyncio.Future[None]] = []
        self._readings: dict[asyncio.Future[Any], float] = {}
        """When each turn began, in order."""
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, context: Any, seconds: float) -> Any:
        """Return a call's message, as gRPC does.

        Raises:
            TimeoutError: if it is not here after some seconds, or loses its turn.
        """
        async with asyncio.timeout(seconds):
            await self._turn()
            reading = asyncio.ensure_future(context.read())
            self._readings[reading] = asyncio.get_running_loop().time()
            self.memory.take(self.size)
            self._watch()
            try:
                await asyncio.wait({reading})
            finally:
                reading.cancel()
                del self._readings[reading]
                self.memory.give(self.size)
                self._pass_on()
            if reading.cancelled():
                raise TimeoutError(f"not here after {PATIENCE:g} s, while others wait")
            return reading.result()

    async def _turn(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._watch()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):
                    self._waiting.remove(turn)
            else:  # it came just now
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _watch(self) -> None:
        """Look again when the oldest turn has lasted too long, if another call waits."""
        if self._waiting and self._readings and self._timer is None:
            due = next(iter(self._readings.values())) + PATIENCE
            self._timer = asyncio.get_running_loop().call_at(due, self._look)

    def _look(self) -> None:
        self._timer, now = None, asyncio.get_running_loop().time()
        for reading, began in list(self._readings.items())[: len(self._waiting)]:
            if now >= began + PATIENCE:
                reading.cancel()
        self._watch()
