"""Real worker processes, for the tests; and what some of them load, who import this file."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.plain import CopyCode
from codedinvnet.codes.rules import SERVED, Uncoded
from codedinvnet.common.errors import UserError
from codedinvnet.data import sample_images
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers import preload
from codedinvnet.serving.workers.computing import BundleSpec, SchemeComputer
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Computer, Task, WorkerDied
from tests.processes import survivors

ROOT = Path(__file__).resolve().parents[3]


def end_fork_server() -> None:
    """End this process's fork server, if there is one: the next worker is another one's."""
    pid = preload.fork_server()
    if pid is not None:
        preload.kill_fork_server()
        with contextlib.suppress(ChildProcessError):  # multiprocessing has asked for it already
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@asynccontextmanager
async def started(
    size: int, k: int = 4, bundle: str | Path = "mnist", threads: int = 1
) -> AsyncIterator[tuple[ProcessPool, list[int]]]:
    """Run a pool; nothing of it may be left in the end."""
    pool = ProcessPool(BundleSpec(bundle, k, threads=threads))
    await pool.start(size)
    pids = [pid for i in range(size) if (pid := pool.pid(i)) is not None]
    try:
        yield pool, pids
    finally:
        now = [connection.process.pid for connection in pool.connections]
        pids = pids + [pid for pid in now if pid is not None]
        await asyncio.wait_for(pool.stop(), 20)
    assert survivors(pids) == []


def images(*rows: int) -> np.ndarray:
    return sample_images("mnist").images[list(rows)].numpy()


def data_task(attempt: int, row: int) -> Task:
    return Task(attempt, 0, {IMAGES: images(row)})


async def kill_in_mid_request(pool: ProcessPool, pid: int) -> str:
    """Kill worker 0 while it has a task; return the reason once it is known."""
    os.kill(pid, signal.SIGSTOP)  # so that the task is under way for certain
    call = asyncio.ensure_future(pool.call(0, data_task(1, 0)))
    await asyncio.sleep(0.05)
    assert not call.done()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        await asyncio.wait_for(call, 20)
    return str(caught.value)


class Telltale(torch.nn.Module):
    """Its output says what its process has done to itself."""

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[float(gc.get_freeze_count()), float(os.sched_getscheduler(0))]])


class Unloadable(BundleSpec):
    """Cannot be loaded while there is a file."""

    def load(self) -> Computer:
        assert self.part is not None
        if self.part.exists():
            kinds = {"memory": MemoryError, "mistake": UserError}
            raise kinds[self.part.read_text()]("no room")
        return SchemeComputer(Scheme("telltale", CopyCode(Uncoded(4)), {SERVED: Telltale()}, ()))
