"""The open loop: each request is sent when it is due, whether or not others were answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from codedinvnet.collector import sparing_collector
from codedinvnet.progress import Progress

AHEAD = 0.05
"""Seconds until the first request is due."""


async def open_loop(
    call: Callable[[int, float], Coroutine[Any, Any, object]],
    gaps: Sequence[float],
    label: str,
    *,
    most: float = math.inf,
    leave: bool = True,
) -> int:
    """Send requests, and wait for all; return how many were not sent, as too many were open.

    Args:
        call: sends request number i, due at a `time.perf_counter` time. What it raises is raised
            in the end.
        gaps: seconds before each request.
        label: of the progress bar.
        most: requests that may be unanswered at once.
        leave: whether the progress bar stays when all is done.
    """
    pending: set[asyncio.Task[object]] = set()
    errors: list[BaseException] = []
    unsent = 0
    bar = Progress(
        total=len(gaps),
        desc=label,
        unit="request",
        dynamic_ncols=True,
        mininterval=1.0,
        leave=leave,
    )

    def ended(task: asyncio.Task[object]) -> None:
        pending.discard(task)
        bar.update()
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)

    with bar, sparing_collector():
        due = time.perf_counter() + AHEAD
        for number, gap in enumerate(gaps):
            due += gap
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(pending) >= most:
                unsent += 1
                bar.update()
                continue
            task = asyncio.create_task(call(number, due))
            pending.add(task)
            task.add_done_callback(ended)
        while pending:
            await asyncio.wait(pending)
    if errors:
        raise errors[0]
    return unsent
