"""What requests may hold, and when large ones are parsed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from codedinvnet.net.background import in_thread
from codedinvnet.net.memory import Memory
from codedinvnet.serving.answers import DeadlinePassed
from codedinvnet.serving.api.errors import ClientGone
from codedinvnet.serving.dispatch import Dispatcher

Found = TypeVar("Found")
LARGE = 64 * 1024
"""Bytes from which a request is parsed in a thread, so that others are served meanwhile."""
LARGE_TURNS = 3
"""Large requests that are parsed at once."""


class BodyMemory(Memory):
    """Bounds the bytes of all requests, as bodies or tensors, and parses large ones in turn."""

    __slots__ = ("_turns", "dispatcher")

    def __init__(self, most: int, dispatcher: Dispatcher) -> None:
        super().__init__(most)
        self.dispatcher = dispatcher
        self._turns = asyncio.Semaphore(LARGE_TURNS)

    @contextlib.contextmanager
    def holding(self, held: int = 0) -> Iterator[Callable[[int], None]]:
        """Yield a function that says how many bytes a request holds, and refuses too many.

        So many as `held` are counted already.
        """

        def hold(size: int) -> None:
            nonlocal held
            if self.used - held + size > self.most:
                self.dispatcher.refuse(1)
            self.take(size - held)
            held = size

        try:
            yield hold
        finally:
            self.give(held)

    async def parse(
        self, parse: Callable[[], Found], began: float, gone: asyncio.Future[None] | None = None
    ) -> Found:
        """Parse a large request in a thread when its turn comes, unless its time is over by then.

        Raises:
            NotNow: see `Dispatcher.check_room`.
            DeadlinePassed: if the turn comes too late.
            ClientGone: if its client is gone.
        """
        async with self._turns:
            if gone is not None and gone.done():
                raise ClientGone
            self.dispatcher.check_room(1)
            if (passed := time.monotonic() - began) > self.dispatcher.timing.deadline:
                self.dispatcher.metrics.ended("deadline", passed)
                raise DeadlinePassed("deadline passed")
            return await in_thread(parse)

    async def write(self, write: Callable[[], Found]) -> Found:
        """Write a large answer in a thread when its turn comes."""
        async with self._turns:
            return await in_thread(write)
