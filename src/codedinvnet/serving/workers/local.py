"""A pool of local processes, forked from a server that has PyTorch loaded already."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection as pipes
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from codedinvnet.common.errors import UserError, described
from codedinvnet.net.logs import log_event
from codedinvnet.serving.workers import preload
from codedinvnet.serving.workers.computing import WorkerSpec
from codedinvnet.serving.workers.pool import (
    Death,
    InputRefused,
    Result,
    Task,
    WorkerDied,
    WorkerFailed,
)
from codedinvnet.serving.workers.process import (
    FAILED,
    MISTAKEN,
    READY,
    REFUSED,
    REPLY,
    pack_request,
    unpack,
    worker_main,
)

START_TIMEOUT = 120.0
"""Seconds that a worker may take to load."""
STOP_TIMEOUT = 2.0
"""Seconds that a worker may take to end before it is killed."""
EXIT_TIMEOUT = 0.1
"""Seconds in which the exit code of a worker that is gone becomes known."""
STOP_POLL = 0.01
UNREAD = 255
"""multiprocessing's exit code of a process whose own it missed, as when another one's start, in a
thread, has asked for it at the same moment."""
ENDED = "its process ended"
"""Why a worker is dead whose stream is closed."""
PATIENCE = 10.0
"""Seconds that the fork server is given when a start is over or no longer wanted."""


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Let processes be born deaf to SIGTERM, SIGINT and SIGHUP.

    A service manager's stop and a terminal's Ctrl-C or end reach every process of a group; when
    those that we started end is for us to say.
    """
    resource_tracker.ensure_running()  # which unblocks the signals
    deaf_to = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launch(process: BaseProcess, spec: WorkerSpec) -> None:
    """Start a process that will load `spec`; the fork server is deaf as well.

    A fork server whose socket is gone, as from a /tmp that is cleaned up, is replaced.
    """
    with deaf():
        server = preload.fork_server()
        try:
            preload.start_fork_server(spec)
            process.start()
        except (FileNotFoundError, ConnectionRefusedError):
            preload.replace_fork_server(server, spec)
            process.start()


async def _settle(launched: asyncio.Future[None]) -> None:
    """Wait for a launch to end, well or not; end the fork server if it stands still."""
    done, _ = await asyncio.wait({launched}, timeout=PATIENCE)
    if not done:
        log_event("the fork server stands still", logging.ERROR)
        preload.kill_fork_server()
        await asyncio.wait({launched})
    launched.exception()  # has been seen


async def _exit_of(process: BaseProcess) -> str:
    """Return how a process ended, "SIGKILL" or "code 1"; waits a moment for it."""
    for _ in range(round(EXIT_TIMEOUT / STOP_POLL)):
        if not process.is_alive():
            break
        await asyncio.sleep(STOP_POLL)
    code = process.exitcode
    if code in (None, UNREAD):
        return "unknown"
    return signal.Signals(-code).name if code < 0 else f"code {code}"


@dataclass(eq=False)
class Connection(asyncio.Protocol):
    """A running worker, and the stream of its replies; `buried` is called when that ends.

    The worker is killed when the leash is closed, even if the fork server is gone (Linux).
    """

    process: BaseProcess
    leash: pipes.Connection
    buried: Callable[[Connection, str], None]
    waiting: dict[int, asyncio.Future[Result]] = field(default_factory=dict)
    """Attempt -> its result to come."""
    dead: str = ""
    """Why, once it is."""
    replaced: bool = False
    """Whether another was to take its place: how it ended is known, or was our doing."""

    def __post_init__(self) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport  # uvloop's is no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        buffer, place = self._buffer, 0
        try:
            while len(buffer) - place >= REPLY.size:
                attempt, status, seconds, encoding, size = REPLY.unpack_from(buffer, place)
                end = place + REPLY.size + size
                if end > len(buffer):
                    break
                self._hear(attempt, status, (seconds, encoding), buffer[place + REPLY.size : end])
                place = end
        except Exception as error:  # what follows in the stream is unknown
            log_event("a worker's replies cannot be read", logging.ERROR, error)
            self.bury(f"its replies cannot be read: {described(error)}")
        del buffer[:place]

    def _hear(
        self, attempt: int, status: int, times: tuple[float, float], payload: bytearray
    ) -> None:
        if not self.ready.done():
            self._greeted(status, payload.decode())
            return
        future = self.waiting.pop(attempt, None)
        if future is None or future.done():
            return
        try:
            if status in (FAILED, REFUSED):
                raise (WorkerFailed if status == FAILED else InputRefused)(payload.decode())
            future.set_result(Result(unpack(payload), *times))
        except Exception as error:  # what is no reply fails its task, not the worker
            future.set_exception(error)

    def _greeted(self, status: int, message: str) -> None:
        if status == READY:
            self.ready.set_result(None)
            return
        kind = UserError if status == MISTAKEN else WorkerDied
        self.ready.set_exception(kind(f"cannot start: {' '.join(message.split())}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.bury(ENDED)

    def call(self, task: Task) -> asyncio.Future[Result]:
        """Send a task; return its result to come."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        if self.dead:
            future.set_exception(WorkerDied(self.dead))
            return future
        self.waiting[task.attempt] = future
        try:
            self.transport.write(pack_request(task))
        except RuntimeError:  # of uvloop: the stream is about to end
            self.bury(ENDED)
        return future

    def bury(self, reason: str) -> None:
        """Called when the worker is gone: what it had to do is lost."""
        if self.dead:
            return
        self.dead = reason
        self.transport.close()
        if not self.ready.done():
            self.ready.set_exception(WorkerDied("did not start"))
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(WorkerDied(reason))
        self.waiting.clear()
        self.buried(self, reason)

    def kill(self) -> None:
        """End the process at once."""
        self.transport.close()
        self.leash.close()
        if self.process.is_alive():  # its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()


class ProcessPool:
    """One process a worker, each behind a socket pair.

    A worker's death closes its socket, which is noticed at once, whether it was busy or not.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.on_death: Death | None = None
        self.connections: list[Connection] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["codedinvnet.serving.workers.process", preload.__name__]
        )
        self.stopping = False
        # Of its own: others that wait for a thread must not wait for the fork server.
        self.launcher = ThreadPoolExecutor(thread_name_prefix="launch")

    async def start(self, size: int) -> None:
        """Start the workers.

        Raises:
            UserError: if one cannot start or load the bundle.
        """
        spawned = [asyncio.ensure_future(self._spawn(worker)) for worker in range(size)]
        try:
            started = await asyncio.gather(*spawned, return_exceptions=True)
        finally:  # when cancelled, too: `stop` must know whom to end
            self.connections = [
                task.result()
                for task in spawned
                if not task.cancelled() and task.exception() is None
            ]
        for problem in started:
            if isinstance(problem, BaseException):
                await self.stop()
                if isinstance(problem, UserError) or not isinstance(problem, Exception):
                    raise problem
                if isinstance(problem, WorkerDied):
                    raise UserError(str(problem)) from problem
                reason = f"{type(problem).__name__}: {problem}"
                raise UserError(f"the workers cannot start: {reason}") from problem
        for worker, connection in enumerate(self.connections):
            if connection.dead and self.on_death is not None:  # while others were starting
                self.on_death(worker, connection.dead)

    async def _spawn(self, worker: int) -> Connection:
        """Start a worker and wait until it is ready; whatever goes wrong, it is gone again."""
        ours, theirs = socket.socketpair()
        held, leash = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=worker_main, args=(theirs, held, self.spec), daemon=True, name=f"worker-{worker}"
        )
        loop = asyncio.get_running_loop()
        launched = loop.run_in_executor(self.launcher, launch, process, self.spec)
        connection: Connection | None = None
        try:
            try:
                await asyncio.wait_for(asyncio.shield(launched), START_TIMEOUT)
            except TimeoutError:
                raise WorkerDied(f"worker {worker} did not start in time") from None
            finally:
                await _settle(launched)  # when cancelled, too: there is a process to end then
                theirs.close()
                held.close()
            connection = Connection(process, leash, partial(self._buried, worker))
            found = connection  # for the closure
            await loop.create_connection(lambda: found, sock=ours)
            await self._greet(worker, connection)
        except BaseException:
            if connection is not None:
                connection.kill()
            else:
                ours.close()  # which the worker ends by
                leash.close()
            raise
        return connection

    async def _greet(self, worker: int, connection: Connection) -> None:
        """Wait for a worker's first word.

        Raises:
            UserError: if that tells of a user's mistake.
            WorkerDied: if it does not come, or the worker cannot start for another reason, which
                may pass: memory that the one before has not given back yet, for one.
        """
        try:
            await asyncio.wait_for(connection.ready, START_TIMEOUT)
        except TimeoutError:
            raise WorkerDied(f"worker {worker} did not start") from None
        except (UserError, WorkerDied) as error:
            raise type(error)(f"worker {worker} {error}") from error

    def _buried(self, worker: int, connection: Connection, reason: str) -> None:
        known = worker < len(self.connections) and self.connections[worker] is connection
        if self.on_death is not None and known and not self.stopping:
            self.on_death(worker, reason)

    def call(self, worker: int, task: Task) -> asyncio.Future[Result]:
        return self.connections[worker].call(task)

    async def replace(self, worker: int) -> None:
        old = self.connections[worker]
        if old.dead and not old.replaced:  # by itself, and noticed before its exit code is known
            how = await _exit_of(old.process)
            log_event("worker ended", logging.WARNING, worker=worker, exit=how)
        old.replaced = True
        old.kill()
        old.bury("replaced")
        self.connections[worker] = await self._spawn(worker)

    async def _end(self, connection: Connection) -> None:
        """Wait for a worker whose stream is closed to end by itself; else kill it."""
        for _ in range(round(STOP_TIMEOUT / STOP_POLL)):
            if not connection.process.is_alive():
                return
            await asyncio.sleep(STOP_POLL)
        connection.kill()

    async def stop(self) -> None:
        self.stopping = True
        for connection in self.connections:
            connection.bury("stopped")
        try:
            await asyncio.gather(*[self._end(c) for c in self.connections])
            await self._see_off()
        finally:  # when cancelled, too: this process's end waits for theirs
            for connection in self.connections:
                connection.kill()
            self.launcher.shutdown(wait=False)  # launches go on: `_settle` waits for each
        self.connections = []

    async def _see_off(self) -> None:
        """Wait until the fork server says that all have ended; this process's end waits for it."""
        processes = [connection.process for connection in self.connections]
        for _ in range(round(PATIENCE / STOP_POLL)):
            if not any(process.is_alive() for process in processes):
                return
            await asyncio.sleep(STOP_POLL)
        preload.kill_fork_server()

    def pid(self, worker: int) -> int | None:
        connection = self.connections[worker]
        return None if connection.dead else connection.process.pid
