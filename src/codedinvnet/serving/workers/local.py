"""A pool of local processes, forked from a server that has PyTorch loaded already."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection as pipes
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

from codedinvnet.errors import UserError
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.tensors import unpack
from codedinvnet.serving.workers import preload
from codedinvnet.serving.workers.computing import WorkerSpec
from codedinvnet.serving.workers.pool import Death, Task, WorkerDied, WorkerFailed
from codedinvnet.serving.workers.process import (
    FAILED,
    MISTAKEN,
    READY,
    REPLY,
    pack_request,
    worker_main,
)
from codedinvnet.serving.workers.result import Result

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


def prepare(spec: WorkerSpec) -> None:
    """Load, for the cache that it fills; the workers will meet the same errors, and can tell."""
    with contextlib.suppress(Exception):
        spec.load()


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


def read_reply(status: int, payload: bytes, seconds: float, encoding: float) -> Result:
    """Return the result in a worker's reply.

    Raises:
        WorkerFailed: if the worker raised.
    """
    if status == FAILED:
        raise WorkerFailed(payload.decode())
    return Result(unpack(bytearray(payload)), seconds, encoding)


@dataclass
class Connection:
    """One running worker."""

    process: BaseProcess
    leash: pipes.Connection
    """The worker is killed when this is closed, also when the fork server is gone (Linux)."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    waiting: dict[int, asyncio.Future[Result]] = field(default_factory=dict)
    listener: asyncio.Task[None] | None = None
    dead: str = ""
    """Why, once it is."""
    replaced: bool = False
    """Whether another was to take its place: how it ended is told, or was our doing."""


class ProcessPool:
    """One process a worker, each behind a socket pair.

    A worker's death closes its socket, which is noticed at once, whether it was busy or not.

    Args:
        spec: what every worker loads.
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
        await self._prepare()
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

    async def _prepare(self) -> None:
        """Let a process fill the cache, so that not every worker does; it ends when cancelled."""
        if await asyncio.to_thread(self.spec.is_prepared):
            return
        began = time.monotonic()
        log_event("preparing the engine", engine=self.spec.engine)
        process = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(self.spec,), daemon=True
        )
        with deaf():
            process.start()
        try:
            await asyncio.to_thread(process.join)
        finally:  # when cancelled, too
            process.kill()
        log_event("prepared", seconds=round(time.monotonic() - began, 1))

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
            except asyncio.TimeoutError:
                raise WorkerDied(f"worker {worker} did not start in time") from None
            finally:
                await _settle(launched)  # when cancelled, too: there is a process to end then
                theirs.close()
                held.close()
            connection = Connection(process, leash, *await asyncio.open_connection(sock=ours))
            await self._greet(worker, connection)
        except BaseException:
            if connection is not None:
                self._kill(connection)
            else:
                ours.close()  # which the worker ends by
                leash.close()
            raise
        connection.listener = asyncio.create_task(self._listen(worker, connection))
        return connection

    async def _greet(self, worker: int, connection: Connection) -> None:
        """Wait for a worker's first word.

        Raises:
            UserError: if that tells of a user's mistake.
            WorkerDied: if it does not come, or the worker cannot start for another reason, which
                may pass: memory that the one before has not given back yet, for one.
        """
        reader = connection.reader
        try:
            head = await asyncio.wait_for(reader.readexactly(REPLY.size), START_TIMEOUT)
            _, status, _, _, size = REPLY.unpack(head)
            message = (await reader.readexactly(size)).decode()
        except (asyncio.TimeoutError, asyncio.IncompleteReadError) as error:
            raise WorkerDied(f"worker {worker} did not start") from error
        if status != READY:
            kind = UserError if status == MISTAKEN else WorkerDied
            raise kind(f"worker {worker} cannot start: {' '.join(message.split())}")

    async def _listen(self, worker: int, connection: Connection) -> None:
        reader, reason = connection.reader, ENDED
        try:
            while True:
                head = await reader.readexactly(REPLY.size)
                attempt, status, seconds, encoding, size = REPLY.unpack(head)
                payload = await reader.readexactly(size)
                future = connection.waiting.pop(attempt, None)
                if future is None or future.done():
                    continue
                try:
                    future.set_result(read_reply(status, payload, seconds, encoding))
                except Exception as error:  # what is no reply fails its task, not the worker
                    future.set_exception(error)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # what follows in the stream is not known
            reason = f"its replies cannot be read: {type(error).__name__}: {error}"
            log_event("a worker's listener failed", logging.ERROR, error, worker=worker)
        self._bury(worker, connection, reason)

    def _bury(self, worker: int, connection: Connection, reason: str) -> None:
        if connection.dead:
            return
        connection.dead = reason
        connection.writer.close()
        for future in connection.waiting.values():
            if not future.done():
                future.set_exception(WorkerDied(reason))
        connection.waiting.clear()
        if self.on_death is not None and self.connections and not self.stopping:
            self.on_death(worker, reason)

    async def call(self, worker: int, task: Task) -> Result:
        connection = self.connections[worker]
        if connection.dead:
            raise WorkerDied(connection.dead)
        request = pack_request(task)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        connection.waiting[task.attempt] = future
        try:
            connection.writer.write(request)
        except RuntimeError as error:  # of uvloop: the listener is about to find it out
            del connection.waiting[task.attempt]
            raise WorkerDied(ENDED) from error
        return await future

    async def replace(self, worker: int) -> None:
        old = self.connections[worker]
        if old.dead and not old.replaced:  # by itself, and noticed before its exit code is known
            how = await _exit_of(old.process)
            log_event("worker ended", logging.WARNING, worker=worker, exit=how)
        old.replaced = True
        self._kill(old)
        self._bury(worker, old, "replaced")
        self.connections[worker] = await self._spawn(worker)

    async def _end(self, connection: Connection) -> None:
        """Wait for a worker whose stream is closed to end by itself; else kill it."""
        for _ in range(round(STOP_TIMEOUT / STOP_POLL)):
            if not connection.process.is_alive():
                return
            await asyncio.sleep(STOP_POLL)
        self._kill(connection)

    def _kill(self, connection: Connection) -> None:
        connection.writer.close()
        connection.leash.close()
        if connection.process.is_alive():  # its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                connection.process.kill()

    async def stop(self) -> None:
        self.stopping = True
        for worker, connection in enumerate(self.connections):
            self._bury(worker, connection, "stopped")
        listeners = [c.listener for c in self.connections if c.listener is not None]
        try:
            await asyncio.gather(*[self._end(c) for c in self.connections])
            await self._see_off()
        finally:  # when cancelled, too: this process's end waits for theirs
            for connection in self.connections:
                self._kill(connection)
            self.launcher.shutdown(wait=False)  # launches go on: `_settle` waits for each
        for listener in listeners:
            listener.cancel()
        await asyncio.gather(*listeners, return_exceptions=True)
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
