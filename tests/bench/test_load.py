from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.arrivals import poisson_gaps
from codedinvnet.bench.load import Reply, connect, descendants, open_loop, processor_time, server
from codedinvnet.errors import UserError
from codedinvnet.quantiles import percentile
from tests.processes import needs_proc, survivors, wait_until


def run_open_loop(rate: float, count: int, seed: int, *, poisson: bool = True) -> list[float]:
    """Return when each request was due, from the first on."""
    dues: list[float] = []

    async def call(i: int, due: float) -> Reply:
        assert due <= time.perf_counter() + 0.005  # never early
        dues.append(due)
        await asyncio.sleep(0.05)  # far longer than a gap: arrivals do not wait for answers
        return Reply(f"{i}", (i,), 0.05, status=200)

    replies = asyncio.run(
        open_loop(call, rate=rate, count=count, seed=seed, label="test", poisson=poisson)
    )
    assert [reply.identity for reply in replies] == [str(i) for i in range(count)]
    return [due - dues[0] for due in dues]


def test_arrivals_do_not_wait_for_answers() -> None:
    began = time.perf_counter()
    run_open_loop(2000, 200, seed=0)
    assert time.perf_counter() - began < 5  # one after the other would take 10 s


def test_arrivals_come_from_the_seed() -> None:
    first, again, other = (run_open_loop(2000, 50, seed=seed) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-6)
    assert first != pytest.approx(other, abs=1e-3)
    gaps = poisson_gaps(2000, 50, 1)  # what the simulator repeats
    assert first == pytest.approx([sum(gaps[1 : i + 1]) for i in range(50)], abs=1e-6)


def test_gaps() -> None:
    even = run_open_loop(1000, 50, seed=0, poisson=False)
    assert even == pytest.approx([i / 1000 for i in range(50)], abs=1e-6)
    drawn = run_open_loop(2000, 400, seed=0)
    gaps = [b - a for a, b in itertools.pairwise(drawn)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 2000, rel=0.2)
    # Exponential gaps spread as wide as they are long.
    assert percentile(gaps, 0.95) == pytest.approx(3 / 2000, rel=0.4)


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
            server(*words, "--hang-timeout-ms", "30000", log=tmp_path / "log") as process,
            connect(process.address, "mnist", images) as client,
        ):
            below.extend([process.pid, *descendants(process.pid)])
            (worker,) = (w["pid"] for w in (await client.state())["workers"])
            os.kill(worker, signal.SIGSTOP)
            request = asyncio.ensure_future(client.infer("open", [0]))
            while (await client.metrics())["codedinvnet_pending_queries"] < 1:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            request.cancel()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert time.monotonic() - began < 5
    assert len(below) >= 3  # the server, its fork server, and the worker
    assert survivors(below, timeout=2) == []


@needs_proc
def test_processor_time() -> None:
    work = "sum(i * i for i in range(6_000_000))"
    ending = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{work}']); input()"
    with subprocess.Popen([sys.executable, "-c", ending], stdin=subprocess.PIPE) as process:
        before = processor_time(process.pid)
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
