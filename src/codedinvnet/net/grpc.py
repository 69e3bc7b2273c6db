"""gRPC, if it is installed: settings, turns to read messages, certificates that are renewed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from codedinvnet.common.errors import UserError
from codedinvnet.net.memory import Memory
from codedinvnet.net.tls import Certificate, Renewal

try:
    import grpc
except ImportError as error:
    raise UserError("gRPC needs an extra: pip install 'codedinvnet[grpc]'") from error

__all__ = ["Turns", "at_once", "grpc", "renewed_credentials", "settings"]

WINDOW = 1 << 16
"""Bytes that gRPC takes of a message that is not read yet."""
FEWEST_CALLS, MOST_CALLS = 64, 4096
"""Calls at once, whatever their size."""
PATIENCE = 1.0
"""Seconds for a message once its turn has come, while other calls wait for theirs."""


def settings(**values: int) -> tuple[tuple[str, int], ...]:
    """Return settings of a channel or server as gRPC takes them."""
    return tuple((f"grpc.{name}", value) for name, value in values.items())


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


def at_once(memory: Memory) -> int:
    """Return how many calls a server takes at once."""
    return min(max(FEWEST_CALLS, memory.most // WINDOW), MOST_CALLS)


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
