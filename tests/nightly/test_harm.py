"""Minutes of harm to a service, of which its clients see nothing wrong: `make nightly`.

Every fault that an upstream can do to a gateway has a short test of its own in tests/gateway.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.client import Client, connect
from benchmarks.load import Load, arrivals
from codedinvnet.common.processes import descendants, server
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle
from codedinvnet.protocol.http import render_request
from codedinvnet.protocol.messages import InferRequest
from tests.processes import needs_proc

pytestmark = [pytest.mark.timeout(1800), needs_proc]
QUERIES, RATE = int(os.environ.get("QUERIES", "10000")), 60.0
MALFORMED, BURST = 5000, 50
DEADLINE = 5.0
SERVICE, WORKERS = 0.05, 4
"""Of the overloaded service, whose workers sleep: the client needs the processors as well."""


@asynccontextmanager
async def serving(log: Path) -> AsyncIterator[tuple[Client, int]]:
    """Serve a bundle; yield a client of it with 1,000 images, and the process."""
    images = sample_images("mnist").batch(torch.arange(1000))[0].numpy()
    options = ("--k", "4", "--set", "hang-timeout-ms=1000", "--deadline-ms", str(1000 * DEADLINE))
    async with (
        server("mnist", *options, log=log) as process,
        connect(process.address, "mnist", images) as client,
    ):
        await client.warm(([i] for i in range(30)), log)
        yield client, process.pid


def send_signal(pids: list[int], number: int) -> int:
    """Send a signal to processes; return how many there still were."""
    sent = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            sent += 1
    return sent


def command_of(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


async def harm(client: Client, pid: int, done: Counter[str]) -> None:
    """Kill and stop workers, and kill fork servers, one every two seconds."""
    draw = random.Random(0)
    for turn in range(1, 10_000):
        await asyncio.sleep(2.0)
        state = (await client.get("page/state"))["workers"]
        workers = [worker["pid"] for worker in state if worker["pid"]]
        if turn % 5 == 0:
            servers = set(descendants(pid)) - set(workers)
            forks = [each for each in servers if b"forkserver" in command_of(each)]
            done["fork servers killed"] += send_signal(forks[:1], signal.SIGKILL)
        elif workers:
            name, number = [("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)][turn % 2]
            done[f"workers {name}"] += send_signal([draw.choice(workers)], number)


async def test_every_query_is_answered_while_workers_are_killed_and_stopped(
    tmp_path: Path,
) -> None:
    bundle, done = load_bundle("mnist"), Counter[str]()
    async with serving(tmp_path / "log") as (client, pid):
        labels = bundle.classify(bundle.embed(torch.from_numpy(client.images))).argmax(1).numpy()
        harming = asyncio.create_task(harm(client, pid, done))
        draw = random.Random(0)
        rows = [[draw.randrange(len(labels))] for _ in range(QUERIES)]
        replies = await client.load(rows, rate=RATE, seed=0, label="workers")
        harming.cancel()
    outcomes = Counter(outcome for reply in replies for outcome in reply.outcomes)
    print(done, outcomes)
    assert [reply.error for reply in replies if not reply.ok] == []
    assert all(reply.returned == reply.identity for reply in replies)
    assert all(reply.latency < DEADLINE + 1 for reply in replies)
    direct = [reply for reply in replies if reply.outcomes == ("direct",)]
    assert [int(reply.labels[0]) for reply in direct] == [labels[r.rows[0]] for r in direct]
    assert outcomes["decoded"] > 0
    for what in ("workers killed", "workers stopped", "fork servers killed"):
        assert done[what] > 5


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 1e308, "", "x", "FP32", "BYTES", [], {}, [[]], [-1], [1e9]),
    *([1, 1, 28], [10**9, 1, 28, 28], ["1"], {"a": {"b": []}}, "\u0000", "é" * 300),
    *({"shared_memory_region": "x"}, {"binary_data_size": 10**12}, {"binary_data_size": "7"}),
    *([[0] * 28] * 28, [{"name": "label"}] * 50, [{"name": 3}], list(range(3000))),
)
"""What fields are replaced by."""


def spoilt(draw: random.Random, image: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Return a request that was right before something was done to it."""
    tensor: dict[str, Any] = {
        "name": "images",
        "shape": list(image.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": image.nbytes},
    }
    head: dict[str, Any] = {"id": "spoilt", "inputs": [tensor]}
    junk, kind = draw.choice(JUNK), draw.randrange(6)
    if kind == 0:
        tensor[draw.choice(list(tensor))] = junk
    elif kind == 1:
        head[draw.choice(["inputs", "parameters", "outputs", "id"])] = junk
    elif kind == 2:
        tensor["data"] = junk
    written = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(written))}
    body = written + image.tobytes()
    if kind == 3:
        body = body[: draw.randrange(len(body))]
    elif kind == 4:
        changed = bytearray(body)
        for _ in range(8):
            changed[draw.randrange(len(written))] = draw.randrange(256)
        body = bytes(changed)
    elif kind == 5:
        lengths = ["-1", "x", "9" * 30, str(len(body) + 1), "0", "1e3"]
        headers["Inference-Header-Content-Length"] = draw.choice(lengths)
    return body, headers


async def test_nonsense_is_refused(tmp_path: Path) -> None:
    draw, limit = random.Random(0), asyncio.Semaphore(BURST)
    async with serving(tmp_path / "log") as (client, _):

        async def send(body: bytes, headers: dict[str, str]) -> int:
            async with limit:
                return (await client.post(body, headers)).status

        requests = [spoilt(draw, client.images[:1]) for _ in range(MALFORMED)]
        statuses = Counter(await asyncio.gather(*[send(*request) for request in requests]))
    print(statuses)
    assert max(statuses) < 500
    assert sum(n for status, n in statuses.items() if status >= 400) > MALFORMED / 2


class Sleeping(nn.Module):
    """Maps x to 3x + 1 in SERVICE seconds, and needs no processor."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(SERVICE)
        return 3 * x + 1


def sleeping() -> tuple[nn.Module, Tensor]:
    return Sleeping(), torch.zeros(1, 4)


async def test_an_overloaded_service_does_what_it_can(tmp_path: Path) -> None:
    body = render_request(InferRequest({"x": np.zeros((1, 4), np.float32)}), binary=True)
    options = ("--workers", str(WORKERS), "--policy", "uncoded")
    deadline = ("--deadline-ms", str(1000 * DEADLINE))
    place = f"{__name__}:sleeping"
    async with server(place, *options, *deadline, log=tmp_path / "log") as process:
        url = f"{process.address}/v2/models/sleeping/infer"
        load, rate = Load(url, [body.data], tuple(body.headers.items())), 5 * WORKERS / SERVICE
        report = await load.run(arrivals(rate, round(20 * rate), 0), "overload")
    print(report)
    assert set(report["errors"]) == {"HTTP 503"}
    assert report["errors"]["HTTP 503"] > report["answered"]
    assert report["goodput_per_s"] >= 0.95 * WORKERS / SERVICE
    assert max(filter(math.isfinite, load.latencies)) < 1000 * (DEADLINE + 1)
