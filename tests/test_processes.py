from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.common.processes import (
    descendants,
    processor_time,
    server,
    usable_processors,
)
from codedinvnet.evaluation.client import connect
from tests.processes import needs_proc, survivors, wait_until


@pytest.mark.parametrize(
    ("told", "count"),
    [
        ("max 100000", 8),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("", 8),
    ],
)
def test_processors_are_those_that_a_container_has(
    told: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (tmp_path / "cpu.max").write_text(f"{told}\n")
    assert usable_processors(tmp_path / "cpu.max") == count
    assert usable_processors(tmp_path / "nowhere") == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_processors(tmp_path / "nowhere") == 64


def test_a_server_that_cannot_start_is_reported() -> None:
    async def start() -> None:
        async with server("nonsense"):
            pass

    with pytest.raises(UserError, match=r"did not start.*nonsense"):
        asyncio.run(start())


@needs_proc
def test_a_server_ends_at_once_with_a_body_that_was_interrupted(tmp_path: Path) -> None:
    """Though a request is open, which a server that drains waits for."""
    images = np.zeros((1, 1, 28, 28), np.uint8)
    below: list[int] = []
    began = 0.0

    async def interrupted() -> None:
        nonlocal began
        words = ("mnist", "--policy", "uncoded", "--workers", "1", "--deadline-ms", "30000")
        async with (
            server(*words, "--set", "hang-timeout-ms=30000", log=tmp_path / "log") as process,
            connect(process.address, "mnist", images) as client,
        ):
            below.extend([process.pid, *descendants(process.pid)])
            (worker,) = (w["pid"] for w in (await client.get("page/state"))["workers"])
            os.kill(worker, signal.SIGSTOP)
            request = asyncio.ensure_future(client.infer("open", [0]))
            while (await client.metrics())["codedinvnet_pending_queries"] < 1:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            request.cancel()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert time.monotonic() - began < 15
    assert len(below) >= 3  # the server, its fork server, and the worker
    assert survivors(below) == []


@needs_proc
def test_processor_time() -> None:
    work = "sum(i * i for i in range(6_000_000))"
    begins = "import subprocess, sys; print(flush=True); input()"
    ending = f"{begins}; subprocess.run([sys.executable, '-c', '{work}']); input()"
    command = [sys.executable, "-c", ending]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # its start takes a while, too
        before = processor_time(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert wait_until(lambda: len(descendants(process.pid)) == 1)
        assert wait_until(lambda: not descendants(process.pid), timeout=60)
        idle = processor_time(process.pid)
        sum(i * i for i in range(6_000_000))
        after = processor_time(process.pid)
        process.communicate(b"\n")
    assert before is not None
    assert idle is not None
    assert after is not None
    assert idle.first - before.first < 0.1  # its child's work is not its own
    assert idle.first == after.first  # it waits
    slack = 0.03  # of counters in hundredths of a second
    for earlier, later in ((before, idle), (idle, after)):
        # Once by the other one's child, which has ended, and once by this process.
        assert 0.1 < later.own - earlier.own <= later.whole - earlier.whole + slack
        assert later.busy - earlier.busy <= later.whole - earlier.whole + slack
