"""Real worker processes, for the tests."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.data import sample_images
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Task, WorkerDied
from tests.processes import survivors

ROOT = Path(__file__).resolve().parents[3]


NOTICED = 3.0
"""Seconds in which a death must be noticed; an idle machine takes some milliseconds."""


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


async def kill_in_mid_request(pool: ProcessPool, pid: int) -> tuple[str, float]:
    """Kill worker 0 while it has a task; return the reason and after how long it is known."""
    os.kill(pid, signal.SIGSTOP)  # so that the task is under way for certain
    call = asyncio.create_task(pool.call(0, data_task(1, 0)))
    await asyncio.sleep(0.05)
    assert not call.done()
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        await asyncio.wait_for(call, 20)
    return str(caught.value), time.perf_counter() - began
