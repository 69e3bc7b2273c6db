"""Real worker processes leave nothing behind, whoever ends first."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.processes import descendants
from codedinvnet.serving.workers import local as process_pool
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import WorkerDied
from tests.observing import until
from tests.processes import alive, ended, needs_proc, parent, state, survivors, wait_until
from tests.serving.workers.worker_processes import ROOT, data_task, started


async def test_a_stop_that_is_cancelled_ends_a_stopped_worker() -> None:
    """A second Ctrl-C: this process's end waits for theirs."""

    pool = ProcessPool(BundleSpec("mnist", 4))
    await pool.start(2)
    pids = [pid for i in range(2) if (pid := pool.pid(i)) is not None]
    os.kill(pids[1], signal.SIGSTOP)
    stopping = asyncio.create_task(pool.stop())
    await asyncio.sleep(0.1)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert survivors(pids) == []


PARENT = """
import asyncio, signal
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.local import Connection, ProcessPool

signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))

async def run():
    pool = ProcessPool(BundleSpec("mnist", 4))
    await pool.start(3)
    print(*[pool.pid(i) for i in range(3)], flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(run())
"""


@contextmanager
def front_end(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Run a process that has a pool, in a process group of its own; yields its workers, too."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    with ended(process):
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 3
        assert all(alive(pid) for pid in workers)
        yield process, workers


@needs_proc
@pytest.mark.parametrize("serves", [True, False], ids=["fork server", "without it"])
def test_nothing_outlives_the_front_end(serves: bool, tmp_path: Path) -> None:
    with front_end(tmp_path) as (process, workers):
        # A service manager's stop, or timeout(1)'s, goes to the group: the front end drains first.
        assert process.stdout is not None
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
            assert process.stdout.readline() == "told\n"
        time.sleep(0.3)
        assert all(alive(pid) for pid in workers)

        below = descendants(process.pid)
        assert set(workers) < set(below)
        if not serves:
            server = parent(workers[0])
            os.kill(server, signal.SIGKILL)
            assert wait_until(lambda: not alive(server))
        os.kill(workers[1], signal.SIGSTOP)
        assert wait_until(lambda: state(workers[1]) == "T")
        process.kill()
        process.wait(10)
        assert survivors(below) == []


@needs_proc
async def test_the_fork_server_is_lost() -> None:
    async with started(2) as (pool, pids):
        deaths: list[int] = []
        pool.on_death = lambda worker, _: deaths.append(worker)
        server = parent(pids[0])
        assert server in descendants(os.getpid())
        os.kill(server, signal.SIGKILL)
        await until(lambda: not alive(server))
        await asyncio.gather(*[pool.call(i, data_task(1 + i, 0)) for i in range(2)])

        os.kill(pids[1], signal.SIGSTOP)  # it is killed without the fork server's help
        await pool.replace(1)
        assert survivors(pids[1:]) == []
        assert parent(pool.pid(1) or 0) != server
        await asyncio.gather(*[pool.call(i, data_task(3 + i, 0)) for i in range(2)])
        assert deaths == [1]
        os.kill(pids[0], signal.SIGSTOP)  # nor does it outlive the pool


@needs_proc
async def test_a_fork_server_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "PATIENCE", 0.3)

    async with started(2) as (pool, pids):
        os.kill(parent(pids[0]), signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(process_pool, "START_TIMEOUT", 0.3)
            with pytest.raises(WorkerDied, match="did not start in time"):
                await asyncio.wait_for(pool.replace(0), 20)
        await pool.call(1, data_task(1, 0))  # it outlives the fork server
        await pool.replace(0)
        await pool.call(0, data_task(2, 0))

        server = parent(pool.connections[0].process.pid or 0)
        os.kill(server, signal.SIGSTOP)
        replacing = asyncio.create_task(pool.replace(0))  # is cancelled meanwhile
        await asyncio.sleep(0.1)
        replacing.cancel()
        await asyncio.wait({replacing}, timeout=20)
        assert replacing.cancelled()
        await until(lambda: not alive(server))


@needs_proc
async def test_a_fork_server_that_stands_still_does_not_keep_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_pool, "PATIENCE", 0.3)

    async with started(2) as (pool, pids):
        processes = [connection.process for connection in pool.connections]
        os.kill(parent(pids[0]), signal.SIGSTOP)
        await asyncio.wait_for(pool.stop(), 20)
        await until(lambda: not any(process.is_alive() for process in processes))
