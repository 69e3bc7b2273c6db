"""Bodies of requests: how they are read, what they may hold, and whether their client is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from codedinvnet.serving.answers import DeadlinePassed
from codedinvnet.serving.background import in_thread
from codedinvnet.serving.faces.v2 import TooLarge
from codedinvnet.serving.logs import log_event

if TYPE_CHECKING:
    from codedinvnet.serving.frontend import FrontEnd

Found = TypeVar("Found")


class TooSlow(Exception):
    """A request's body did not come in time."""


async def read_body(
    request: Request, limit: int, seconds: float, arrived: Callable[[int], None]
) -> bytes:
    """Read a request's body.

    Args:
        request: its.
        limit: bytes, at most.
        seconds: in which it must be here.
        arrived: is told how many bytes are here, and may raise.

    Raises:
        TooLarge: if it has more than `limit` bytes.
        TooSlow: if it is not here after so many seconds; its client may be gone without a word.
    """

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"body: more than {limit} bytes")
            arrived(size)
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise TooSlow(f"body: not here after {seconds:g} s") from None


async def departure(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, goes away."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:  # a server that cannot tell: the client may well be there
        log_event("disconnects are not noticed", logging.WARNING, reason=repr(error))
        await asyncio.Event().wait()


async def read_in_turn(
    turn: asyncio.Semaphore,
    front: FrontEnd,
    parse: Callable[[], Found],
    began: float,
    gone: asyncio.Future[None] | None = None,
) -> Found:
    """Return what a large request is, parsed in a thread: one at a time, and none for nothing.

    Args:
        turn: is had meanwhile.
        front: will answer it.
        parse: reads it.
        began: when it came (`time.monotonic()`).
        gone: done once nobody waits for it.

    Raises:
        NotNow: see `FrontEnd.check_room`.
        DeadlinePassed: if the turn comes too late.
        ClientDisconnect: if nobody waits for it any more.
    """
    async with turn:
        if gone is not None and gone.done():
            raise ClientDisconnect
        front.check_room(1)
        if (passed := time.monotonic() - began) > front.deadline:
            front.metrics.ended("deadline", passed)
            raise DeadlinePassed("deadline passed")
        return await in_thread(parse)


class BodyMemory:
    """Bounds the bytes of all requests that are here.

    Args:
        most: bytes, as bodies or as tensors.
        refuse: raises for so many queries that there is no room.
    """

    def __init__(self, most: int, refuse: Callable[[int], None]) -> None:
        self.most, self.refuse = most, refuse
        self._held = 0
        self.large = asyncio.Semaphore(1)
        """Is had by what reads or writes something large, which takes memory, too, and holds the
        interpreter for a while."""

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that says how many bytes a request holds, and refuses too many."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._held - held + size > self.most:
                self.refuse(1)
            self._held, held = self._held - held + size, size

        try:
            yield hold
        finally:
            self._held -= held
