"""Bodies of requests: how they are read, what they may hold, and who parses them when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from codedinvnet.net.background import in_thread
from codedinvnet.protocol.messages import TooLarge
from codedinvnet.serving.answers import DeadlinePassed
from codedinvnet.serving.dispatch import Dispatcher

Found = TypeVar("Found")
GONE = "codedinvnet.gone"
"""The extension of an ASGI scope that has a future, which is done when the client is gone."""
LARGE = 64 * 1024
"""Bytes from which a request is parsed in a thread, so that others are served meanwhile."""
LARGE_TURNS = 3
"""Large requests that are parsed at once."""


class TooSlow(Exception):
    """A request's body did not come in time."""


async def read_body(
    receive: Receive, limit: int, seconds: float, arrived: Callable[[int], None]
) -> bytes:
    """Read a request's body.

    Args:
        receive: the request's.
        limit: bytes, at most.
        seconds: in which it must be here.
        arrived: is called with how many bytes are here, and may raise.

    Raises:
        TooLarge: if it has more than `limit` bytes.
        TooSlow: if it is not here after so many seconds; its client may be gone without a word.
        ClientDisconnect: if its client leaves.
    """
    task, parts, size, late = asyncio.current_task(), [], 0, False

    def give_up() -> None:
        nonlocal late
        late = True
        if task is not None:
            task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, give_up)
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise TooLarge(f"body: more than {limit} bytes")
            arrived(size)
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)
    except asyncio.CancelledError:
        if not late:
            raise
        getattr(task, "uncancel", int)()
        raise TooSlow(f"body: not here after {seconds:g} s") from None
    finally:
        timer.cancel()


async def departure(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class BodyMemory:
    """Bounds the bytes of all requests that are here, and how many large ones are parsed at once.

    Args:
        most: bytes, as bodies or as tensors.
        dispatcher: refuses what there is no room for.
    """

    def __init__(self, most: int, dispatcher: Dispatcher) -> None:
        self.most, self.dispatcher = most, dispatcher
        self._held = 0
        self._turns = asyncio.Semaphore(LARGE_TURNS)

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that says how many bytes a request holds, and refuses too many."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held - held + size > self.most:
                self.dispatcher.refuse(1)
            self._held, held = self._held - held + size, size

        try:
            yield hold
        finally:
            self._held -= held

    async def parse(
        self,
        parse: Callable[[], Found],
        began: float,
        gone: asyncio.Future[None] | None = None,
    ) -> Found:
        """Parse a large request in a thread when its turn comes, and none for nothing.

        Args:
            parse: reads it.
            began: when it came (`time.monotonic()`).
            gone: done once its client is gone.

        Raises:
            NotNow: see `Dispatcher.check_room`.
            DeadlinePassed: if the turn comes too late.
            ClientDisconnect: if its client is gone.
        """
        async with self._turns:
            if gone is not None and gone.done():
                raise ClientDisconnect
            self.dispatcher.check_room(1)
            if (passed := time.monotonic() - began) > self.dispatcher.timing.deadline:
                self.dispatcher.metrics.ended("deadline", passed)
                raise DeadlinePassed("deadline passed")
            return await in_thread(parse)

    async def write(self, write: Callable[[], Found]) -> Found:
        """Write a large answer in a thread when its turn comes."""
        async with self._turns:
            return await in_thread(write)
