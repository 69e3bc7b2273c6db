"""Helpers for tests that start processes (Linux's /proc where other processes are looked at)."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Running, process_stat, running

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, kills with parents")
PATIENT = ("--deadline-ms", "30000")
"""For machines that are busy with other things."""


def state(pid: int) -> str:
    """Return a process's state, R, S, T, Z …; "" if it is gone."""
    return (process_stat(pid) or [""])[0]


def parent(pid: int) -> int:
    return int(process_stat(pid)[1])


def alive(pid: int) -> bool:
    """Tell whether a process runs or is stopped; one that is dead and not yet reaped is not."""
    return state(pid) not in ("", "Z", "X")


def survivors(pids: Iterable[int], timeout: float = 10.0) -> list[int]:
    """Wait until all processes have ended; return those that have not."""
    pids = list(pids)
    wait_until(lambda: not any(alive(pid) for pid in pids), timeout)
    return [pid for pid in pids if alive(pid)]


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Wait until a condition holds; return whether it does."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def interruptible() -> Iterator[None]:
    """Have processes that are started meanwhile obey SIGINT, which background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def write_faults(folder: Path, *faults: dict[str, Any]) -> str:
    path = folder / "faults.json"
    path.write_text(json.dumps({"faults": faults}), encoding="utf-8")
    return str(path)


def slow(ms: float, **where: float) -> dict[str, Any]:
    return {"kind": "slow", "delay": {"distribution": "constant", "ms": ms}, **where}


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill a process at the end, if the test that waits for it failed."""
    with process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def served(*arguments: str, log: Path) -> Iterator[Running]:
    """Run `codedinvnet serve ARGUMENTS` for tests that are not coroutines."""
    command = (sys.executable, "-m", "codedinvnet", "serve", *arguments, "--port", "0")
    with running(*command, log=log) as found:
        yield found


@asynccontextmanager
async def server(*arguments: str, log: Path | None = None) -> AsyncIterator[Running]:
    """Run `codedinvnet serve ARGUMENTS --port 0` as `running` does."""
    command = (sys.executable, "-m", "codedinvnet", "serve", *arguments, "--port", "0")
    service = running(*command, log=log)
    found = await asyncio.to_thread(service.__enter__)
    try:
        yield found
    except BaseException:
        service.__exit__(*sys.exc_info())
        raise
    await asyncio.to_thread(service.__exit__, None, None, None)
