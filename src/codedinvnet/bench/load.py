"""Load: a client of the protocol that shares no code with the server, and open-loop arrivals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from codedinvnet.arrivals import poisson_gaps
from codedinvnet.errors import UserError
from codedinvnet.load import loop

START_TIMEOUT = 120.0
STOP_TIMEOUT = 20.0


@dataclass(frozen=True)
class Reply:
    """What one request of B images came to.

    Attributes:
        identity: of the request, as it was sent.
        returned: the `id` in the response.
        status: the HTTP status; 0 if there was no response.
        rows: which images were sent.
        labels: (B,) int64.
        outcomes: `direct`, `decoded` or `guessed` for each image.
        probabilities: (B, classes).
        latency: seconds from when the request was due.
        error: what went wrong.
        work: seconds of it that the server says it waited for workers (its `Server-Timing`).
    """

    identity: str
    rows: tuple[int, ...]
    latency: float
    status: int = 0
    returned: str = ""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    outcomes: tuple[str, ...] = ()
    probabilities: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    error: str = ""
    work: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.status == 200


class Client:
    """Sends batches of images (uint8) with the binary extension.

    Args:
        session: open HTTP session.
        address: of the server.
        model: its name.
        images: (N, C, H, W) uint8, which requests choose from.
    """

    def __init__(
        self, session: aiohttp.ClientSession, address: str, model: str, images: np.ndarray
    ) -> None:
        self.session = session
        self.url = f"{address}/v2/models/{model}/infer"
        self.address = address
        self.images = images

    async def infer(self, identity: str, rows: Sequence[int], due: float | None = None) -> Reply:
        """Send one request and read its answer.

        Args:
            identity: the request's id.
            rows: which images.
            due: when it should have been sent (`time.perf_counter`); latency counts from there.
        """
        began = time.perf_counter() if due is None else due
        batch = self.images[list(rows)]
        head = json.dumps(
            {
                "id": identity,
                "inputs": [
                    {
                        "name": "images",
                        "shape": list(batch.shape),
                        "datatype": "UINT8",
                        "parameters": {"binary_data_size": batch.nbytes},
                    }
                ],
                "outputs": [
                    {"name": "label"},
                    {"name": "outcome"},
                    {"name": "probabilities", "parameters": {"binary_data": True}},
                ],
            }
        ).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        rows = tuple(rows)
        try:
            async with self.session.post(
                self.url, data=head + batch.tobytes(), headers=headers
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            elapsed = time.perf_counter() - began
            return Reply(identity, rows, elapsed, error=f"{type(error).__name__}: {error}")
        latency = time.perf_counter() - began
        if response.status != 200:
            return Reply(identity, rows, latency, response.status, error=body.decode())
        length = int(response.headers["Inference-Header-Content-Length"])
        reply = json.loads(body[:length])
        outputs = {output["name"]: output for output in reply["outputs"]}
        shape = outputs["probabilities"]["shape"]
        return Reply(
            identity,
            rows,
            latency,
            200,
            reply.get("id", ""),
            np.array(outputs["label"]["data"], np.int64),
            tuple(outputs["outcome"]["data"]),
            np.frombuffer(body[length:], "<f4").reshape(shape),
            work=_work(response.headers.get("Server-Timing", "")),
        )

    async def metrics(self) -> dict[str, float]:
        """Return the server's metrics, by name with labels."""
        async with self.session.get(f"{self.address}/metrics") as response:
            text = await response.text()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def times(self) -> dict[str, Any]:
        """Return what the server's tasks took, as distributions of a scenario."""
        async with self.session.get(f"{self.address}/times") as response:
            found: dict[str, Any] = await response.json()
        return found

    async def state(self) -> dict[str, Any]:
        """Return what the server's page shows."""
        async with self.session.get(f"{self.address}/page/state") as response:
            found: dict[str, Any] = await response.json()
        return found


def _work(header: str) -> float:
    """Return the seconds after `work` in a Server-Timing header; 0 without."""
    found = re.search(r"\bwork;dur=([\d.]+)", header)
    return float(found.group(1)) / 1000 if found else 0.0


@asynccontextmanager
async def connect(address: str, model: str, images: np.ndarray) -> AsyncIterator[Client]:
    """Open a client with as many connections as the load needs."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, address, model, images)


WARM_REQUESTS = 30
"""Sent one after another before a measurement: every worker has run then, and hedges know a p95."""


async def warm(client: Client, requests: Iterable[Sequence[int]], log: Path) -> None:
    """Send requests, one after another, so that every worker and path has run once.

    Args:
        client: of the service.
        requests: of each the rows of its images.
        log: the service's, for the error.

    Raises:
        UserError: if one of the answers is an error.
    """
    for number, rows in enumerate(requests):
        reply = await client.infer(f"warm-{number}", rows)
        if not reply.ok:
            raise UserError(f"the service answered a first request with {reply.status}: see {log}")


async def open_loop(
    call: Callable[[int, float], Awaitable[Reply]],
    *,
    rate: float,
    count: int,
    seed: int,
    label: str,
    poisson: bool = True,
    leave: bool = True,
) -> list[Reply]:
    """Send requests at their due times, whether or not earlier ones were answered.

    Args:
        call: sends request number i, due at a `time.perf_counter` time.
        rate: requests a second.
        count: how many.
        seed: of the arrival times.
        label: of the progress bar.
        poisson: exponential gaps; else equal ones.
        leave: whether the progress bar stays when all is done.
    """
    gaps = poisson_gaps(rate, count, seed) if poisson else [1 / rate] * count
    replies: dict[int, Reply] = {}

    async def send(number: int, due: float) -> None:
        replies[number] = await call(number, due)

    await loop.open_loop(send, gaps, label, leave=leave)
    return [replies[number] for number in range(count)]


@dataclass
class ServerProcess:
    """A `codedinvnet serve` of its own."""

    address: str
    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid


@asynccontextmanager
async def server(*arguments: str, log: Path | None = None) -> AsyncIterator[ServerProcess]:
    """Run `codedinvnet serve ARGUMENTS --port 0` and stop it in the end.

    It drains first, unless the body was interrupted or failed: then nobody waits for its answers.

    Raises:
        UserError: if it does not start; with its own words.
    """
    command = [sys.executable, "-m", "codedinvnet", "serve", *arguments, "--port", "0"]
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    errors = open(log, "ab") if log is not None else None  # noqa: SIM115
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=errors or asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT)).decode()
        except asyncio.TimeoutError:
            line = ""
        found = re.search(r"http://\S+?(?=:? |: )", line)
        if found is None:
            raise UserError(
                f"the server did not start: {' '.join(command)}; "
                + (f"see {log}" if log is not None else "run it to see why")
            )
        yield ServerProcess(found.group(0), process)
        await _drained(process)
    finally:
        if process.returncode is None:
            process.kill()  # its workers end with it
            await process.wait()
        if errors is not None:
            errors.close()


async def _drained(process: asyncio.subprocess.Process) -> None:
    """Tell a server to stop, and wait until it has, but not for ever."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT)


class ProcessorTime(NamedTuple):
    """Seconds, summed over this machine's processors."""

    own: float
    """Of some processes."""
    first: float
    """Of one of them alone, without those below it."""
    busy: float
    """Of all processes, and what other virtual machines took meanwhile (steal)."""
    whole: float
    """With those in which a processor had nothing to do."""


def processor_time(pid: int) -> ProcessorTime | None:
    """Return what the processors have done for this process and another, and in all.

    Args:
        pid: the other one, `first`; those below it count, too, and those of them that have ended.

    Returns:
        None but on Linux.
    """
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    words = path.read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, idle, wait, *more = (int(word) for word in words[1:9])
    busy = user + nice + system + sum(more)
    # Of user, system, and both of children that have ended.
    stats = [[int(word) for word in process_stat(p)[11:15]] for p in (pid, *descendants(pid))]
    tick = os.sysconf("SC_CLK_TCK")
    used = time.process_time() + sum(map(sum, stats)) / tick
    return ProcessorTime(used, sum(stats[0][:2]) / tick, busy / tick, (busy + idle + wait) / tick)


def process_stat(pid: int) -> list[str]:
    """Return the fields behind a process's name: state, parent …; [] if it is gone (Linux)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return stat.rsplit(")", 1)[1].split()


def descendants(pid: int) -> list[int]:
    """Return the processes below one, at any depth (Linux)."""
    fields = {int(path.name): process_stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    parents = {child: int(stat[1]) for child, stat in fields.items() if stat}
    found, new = [], [pid]
    while new:
        new = [child for child, above in parents.items() if above in new]
        found += new
    return found
