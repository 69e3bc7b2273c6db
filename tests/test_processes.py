from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import descendants
from codedinvnet.common.errors import UserError
from codedinvnet.serving.opened import usable_processors
from tests.client import connect
from tests.processes import needs_proc, server, survivors


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
        words = ("mnist", "--policy", "uncoded", "--workers", "1", "--deadline-ms", "300000")
        async with (
            server(*words, "--set", "hang-timeout-ms=300000", log=tmp_path / "log") as process,
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
    assert time.monotonic() - began < 150
    assert len(below) >= 3  # the server, its fork server, and the worker
    assert survivors(below) == []
