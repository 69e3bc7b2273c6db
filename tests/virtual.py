"""An event loop whose clock jumps to the next event instead of waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

A_MOMENT = 1e-9
"""By so much the clock jumps beyond the next event, so that no rounding leaves it in front."""


class Leap(selectors.SelectSelector):
    """A selector that lets the time pass instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and nothing will happen"
        if timeout > 0:
            self.now += timeout + A_MOMENT
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time; work for a thread is done at once."""

    def __init__(self) -> None:
        self.leap = Leap()
        super().__init__(self.leap)

    def time(self) -> float:
        return self.leap.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, call: Callable[..., Any], *arguments: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        future.set_result(call(*arguments))
        return future
