"""Background tasks: they end with their owner, and their errors are logged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from codedinvnet.common.errors import described
from codedinvnet.net.logs import log_event

Found = TypeVar("Found")


async def in_thread(function: Callable[[], Found]) -> Found:
    """Return what a function returns in a thread.

    Whoever is cancelled meanwhile still waits until the thread has ended: what it holds for it, a
    turn or memory, is taken until then.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # it is not needed
        raise


def apart(function: Callable[[], Found], name: str) -> asyncio.Future[Found]:
    """Return what a function returns in a daemon thread of its own.

    One that hangs keeps neither other threads nor the end of the process waiting.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Found] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def run() -> None:
        try:
            found, error = function(), None
        except Exception as raised:
            found, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(end, found, error)

    def end(found: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def log_error(error: BaseException) -> None:
    """Log a mistake of our own."""
    log_event("internal error", logging.ERROR, error, reason=described(error))


class Background:
    """What its owner has under way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin something, and return its task; what it raises is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log_error(error)

    async def stop(self) -> None:
        """Cancel all of it, and wait until it has ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class LoopThread:
    """An event loop in a daemon thread, for callers that have none.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()

    def run(self, work: Coroutine[Any, Any, Found]) -> Found:
        """Return what a coroutine returns in the loop; an interrupt cancels it.

        Raises:
            RuntimeError: if the thread was stopped.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what is under way, and end the thread."""
        with contextlib.suppress(RuntimeError):  # it was stopped before
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
