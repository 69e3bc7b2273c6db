"""A pool of Ray actors, one a worker, for more machines than one (the extra `codedinvnet[ray]`).

Actors are never restarted by Ray, which takes seconds to report the death then; the front end has
them replaced. A killed actor is reported within milliseconds, a lost node within seconds, so idle
actors must give a sign of life. All actors end with the front end's own node: the pool then
connects again, as soon as the cluster lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.common.devices import flush_denormals
from codedinvnet.common.errors import UserError
from codedinvnet.net.collector import freeze_loaded
from codedinvnet.net.logs import Quiet, log_event
from codedinvnet.serving.workers.computing import WorkerSpec
from codedinvnet.serving.workers.pool import (
    Death,
    InputRefused,
    Result,
    Task,
    WorkerDied,
    WorkerFailed,
    run_task,
)

START_TIMEOUT = 120.0
"""Seconds that an actor may take to load."""
CONNECT_TIMEOUT = 5.0
"""Seconds to reach the cluster's address."""
HEARTBEAT, HEARTBEAT_TIMEOUT = 1.0, 3.0
"""Seconds between signs of life, and until one is missed."""
USER_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "
"""What a line of Ray's begins with that has an error of the user's."""
ACTOR_CPUS = 0.1
"""What an actor asks Ray for: small, so that many fit on a small machine."""


def last_line(error: BaseException) -> str:
    """Return what an error of Ray's comes down to: the last line of its traceback; "" if none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""


_said = Quiet()


def say(data: dict[str, Any], *_: object, **__: object) -> None:
    """Log what Ray would print among our own lines, without the raylet's log that it appends."""
    lines = [line.strip() for text in data["lines"] for line in text.splitlines() if line.strip()]
    if lines:
        _said.log("ray", logging.WARNING, reason=lines[0])


def has_token() -> bool:
    """Return whether the user has a token of Ray's, in the places where it looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    try:
        return (Path.home() / ".ray" / "auth_token").is_file()
    except RuntimeError:  # this user has no home
        return False


class RayWorker:
    """What runs in an actor's process."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.computer = spec.load()
        freeze_loaded()

    def compute(self, number: int, inputs: Mapping[str, np.ndarray]) -> Result:
        """Compute a task."""
        flush_denormals()  # it is the thread's
        own = {name: np.array(array) for name, array in inputs.items()}  # Ray's are read-only
        return run_task(self.computer, number, own)

    def whereabouts(self) -> tuple[str, int]:
        """Return machine and process; it is answered while a task is computed, too."""
        return socket.gethostname(), os.getpid()


@dataclass
class Actor:
    """One actor."""

    handle: Any
    host: str
    pid: int
    dead: str = ""
    """Why, once it is."""


def take_back_sigterm() -> None:
    """Handle SIGTERM as before Ray was started, if this is the main thread.

    Ray's library puts a handler of its own around it, which prints a trace of the stack, and aborts
    when another signal comes in its midst, as timeout(1) sends two.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)
        signal.siginterrupt(signal.SIGTERM, False)  # as asyncio has it


class RayPool:
    """One actor a worker, spread over the cluster's nodes.

    Without an address it is the cluster that this process is connected to, or else a new one on
    this machine only.

    Raises:
        UserError: if Ray is not installed.
    """

    def __init__(self, spec: WorkerSpec, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("--pool ray needs Ray: pip install 'codedinvnet[ray]'") from error
        self.ray: Any = ray
        self.spec, self.address = spec, address
        self.on_death: Death | None = None
        self.actors: list[Actor] = []
        self.connected = False
        """Whether the connection is this pool's own."""
        self.connecting = asyncio.Lock()
        self.heartbeats: asyncio.Task[None] | None = None
        self.remote: Any = None

    async def start(self, size: int) -> None:
        """Connect, and start the actors.

        Raises:
            UserError: if there is no cluster at the address, or an actor cannot load the bundle.
        """
        if not self.ray.is_initialized():
            await asyncio.to_thread(self._connect)
            take_back_sigterm()
            # Ray has no other way to keep its errors from standard output.
            self.ray._private.worker.print_to_stdstream = say
            self.connected = True
        self.remote = self.ray.remote(
            num_cpus=ACTOR_CPUS,
            num_gpus=0,
            max_restarts=0,
            concurrency_groups={"life": 1},
            scheduling_strategy="SPREAD",
        )(RayWorker)
        spawned = [self._spawn() for _ in range(size)]
        started = await asyncio.gather(*spawned, return_exceptions=True)
        self.actors = [actor for actor in started if isinstance(actor, Actor)]
        for problem in started:
            if isinstance(problem, BaseException):
                await self.stop()
                raise UserError(f"the Ray actors cannot start: {problem}") from problem
        self.heartbeats = asyncio.create_task(self._watch())

    def _connect(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            if not has_token():
                # Our own cluster, reachable only from this machine: Ray would write a token into
                # the home. Ray requires a token by itself where the user has one.
                os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            # Without an address Ray would join whatever cluster runs here already.
            options |= {"address": "local", "include_dashboard": False}
            options["_node_ip_address"] = "127.0.0.1"
        else:
            options["address"] = self.address
        try:
            # Ray itself tries a dead address for minutes.
            if found := re.fullmatch(r"(.+):(\d+)", (self.address or "").removeprefix("ray://")):
                socket.create_connection((found[1], int(found[2])), CONNECT_TIMEOUT).close()
            self.ray.init(**options)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"cannot connect to Ray at {self.address or 'localhost'}: {reason}"
            ) from error

    def _is_cut_off(self) -> bool:
        """Return whether this process's node is out of the cluster, so that no actor can start."""
        try:
            own = self.ray.get_runtime_context().get_node_id()
            return not any(n["Alive"] for n in self.ray.nodes() if n["NodeID"] == own)
        except Exception:  # also after a connection that failed
            return True

    async def _reconnect(self) -> None:
        """Connect again, if the connection is lost.

        Raises:
            WorkerDied: if the cluster is not there.
        """
        async with self.connecting:
            if not self.connected or not await asyncio.to_thread(self._is_cut_off):
                return
            for worker, actor in enumerate(self.actors):
                self._bury(worker, actor, "its cluster is lost")
                actor.handle = None  # it is of no use to another connection
            try:
                await asyncio.to_thread(self.ray.shutdown)
                await asyncio.to_thread(self._connect)
            except UserError as error:  # it may come back
                raise WorkerDied(str(error)) from error
            take_back_sigterm()
            log_event("connected to Ray again")

    async def _spawn(self) -> Actor:
        handle = self.remote.remote(self.spec)
        whereabouts = handle.whereabouts.options(concurrency_group="life").remote()
        try:
            host, pid = await asyncio.wait_for(asyncio.ensure_future(whereabouts), START_TIMEOUT)
        except (TimeoutError, self.ray.exceptions.RayError) as error:
            self._kill(handle)
            reason = last_line(error) or "not ready in time: has the cluster free processors?"
            if reason.startswith(USER_ERROR):
                raise UserError(reason.removeprefix(USER_ERROR)) from error
            raise WorkerDied(reason) from error
        return Actor(handle, host, pid)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            await asyncio.gather(*[self._ask(i) for i in range(len(self.actors))])

    async def _ask(self, worker: int) -> None:
        actor = self.actors[worker]
        if actor.dead:
            return
        try:
            sign = actor.handle.whereabouts.options(concurrency_group="life").remote()
            await asyncio.wait_for(asyncio.ensure_future(sign), HEARTBEAT_TIMEOUT)
        except Exception:  # whatever it is: who cannot be asked is as good as dead
            self._bury(worker, actor, "no sign of life")

    def _bury(self, worker: int, actor: Actor, reason: str) -> None:
        if actor.dead:
            return
        actor.dead = reason
        if self.on_death is not None:
            self.on_death(worker, reason)

    async def call(self, worker: int, task: Task) -> Result:
        actor = self.actors[worker]
        if actor.dead:
            raise WorkerDied(actor.dead)
        exceptions = self.ray.exceptions
        try:
            reference = actor.handle.compute.remote(task.number, dict(task.inputs))
            result: Result = await asyncio.ensure_future(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, InputRefused):
                raise InputRefused(str(error.cause)) from error
            raise WorkerFailed(f"{type(error.cause).__name__}: {error.cause}") from error
        except exceptions.RayError as error:
            reason = f"{type(error).__name__}: {last_line(error)}"
            self._bury(worker, actor, reason)
            raise WorkerDied(reason) from error
        own = {name: np.array(array) for name, array in result.outputs.items()}
        return result._replace(outputs=own)

    async def replace(self, worker: int) -> None:
        old = self.actors[worker]
        old.dead = old.dead or "replaced"
        self._kill(old.handle)
        await self._reconnect()
        self.actors[worker] = await self._spawn()

    def _kill(self, handle: Any) -> None:
        with contextlib.suppress(Exception):  # it may be gone, or its node
            self.ray.kill(handle, no_restart=True)

    async def stop(self) -> None:
        if self.heartbeats is not None:
            self.heartbeats.cancel()
            await asyncio.gather(self.heartbeats, return_exceptions=True)
        for actor in self.actors:
            actor.dead = actor.dead or "stopped"
            self._kill(actor.handle)
        self.actors = []
        if self.connected:
            await asyncio.to_thread(self.ray.shutdown)

    def pid(self, worker: int) -> int | None:
        actor = self.actors[worker]
        here = actor.host == socket.gethostname() and not actor.dead
        return actor.pid if here else None  # a dead one's number may be another process's
