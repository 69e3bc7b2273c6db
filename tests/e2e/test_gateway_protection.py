"""A protection of servers that run already: made from their answers, and used in front of them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import aiohttp
import numpy as np
import pytest

from benchmarks.triton import Triton, is_installed
from codedinvnet.cli import main
from codedinvnet.models import open_model
from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.models.upstream import PATH, described, outputs_of
from codedinvnet.processes import process_stat
from codedinvnet.protect import distil
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.run import running
from tests.processes import served
from tests.protect.conftest import PLACE, queries
from tests.protect.factories import FEATURES

REQUESTS, CLIENTS = 40, 4
SOURCE = f"{PLACE}:vectors"
INPUTS = open_model(SOURCE).signature.inputs
TRITON_CONFIG = f"""
name: "m"
backend: "python"
max_batch_size: 64
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {FEATURES} ] }} ]
output [ {{ name: "output" data_type: TYPE_FP32 dims: [ 4 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
TRITON_MODEL = """
import sys
sys.path.insert(0, NUMPY)
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        x = pb.get_input_tensor_by_name(request, "x").as_numpy()
        y = 8 * np.stack([x[:, i::4].mean(1) for i in range(4)], 1)
        return pb.InferenceResponse([pb.Tensor("output", y.astype(np.float32))])
"""
"""The class of a query is the quarter of its features with the largest mean."""


async def ask(session: aiohttp.ClientSession, url: str, x: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the scores and their outcome."""
    head, blobs = described({"x": x}, INPUTS)
    async with session.post(
        f"{url}{PATH}m/infer",
        data=b"".join([head, *blobs]),
        headers={HEADER_LENGTH: str(len(head))},
    ) as reply:
        body = await reply.read()
        assert reply.status == 200, body
        found = outputs_of(body, reply.headers[HEADER_LENGTH])
        return found["output"], reply.headers["codedinvnet-outcome"]


def family(pid: int) -> list[int]:
    """Return a process, and those that it has started."""
    found = {int(p.name): process_stat(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    below = [child for child, stat in found.items() if stat and int(stat[1]) == pid]
    return [pid, *(one for child in below for one in family(child))]


async def load(url: str, harmed: list[int]) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Send requests while processes stand still; return queries, answers and outcomes."""
    found = []

    async def client(session: aiohttp.ClientSession, seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(REQUESTS):
            x = generator.random((int(generator.integers(1, 4)), FEATURES), np.float32)
            found.append((x, *await ask(session, url, x)))

    async with aiohttp.ClientSession() as session:
        for pid in harmed:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.gather(*(client(session, seed) for seed in range(CLIENTS)))
        finally:
            for pid in reversed(harmed):
                os.kill(pid, signal.SIGCONT)
    return found


Servers: TypeAlias = tuple[list[str], list[int]]
"""Two servers of one model: their addresses, and the processes of the second one."""


@contextmanager
def ours(folder: Path) -> Iterator[Servers]:
    """Run two services."""
    options = (SOURCE, "--set", "name=m", "--workers", "1")
    with (
        served(*options, log=folder / "a.log") as first,
        served(*options, log=folder / "b.log") as second,
    ):
        yield [first.address, second.address], family(second.process.pid)


@contextmanager
def theirs(folder: Path) -> Iterator[Servers]:
    """Run two Tritons."""
    found = [Triton(folder / name, "m", TRITON_CONFIG, TRITON_MODEL) for name in "ab"]
    with ExitStack() as stack:
        for one in found:
            stack.callback(one.kill)
            one.start()
        assert found[1].process is not None
        yield [f"http://127.0.0.1:{one.http}" for one in found], [found[1].process.pid]


async def test_a_protection_made_of_a_running_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 20)
    with (theirs if is_installed() else ours)(tmp_path) as servers:  # at night, ours always
        await check_protection(servers, tmp_path)


async def check_protection(servers: Servers, folder: Path) -> None:
    """Protect the model of the first server, and ask both while the second one stands still."""
    addresses, second = servers
    inputs, out = queries(folder), folder / "protection"
    teacher = f"{addresses[0]}{PATH}m"
    words = ["protect", teacher, "--inputs", str(inputs), "--out", str(out), "--k", "4"]
    words += ["--minutes", "1", "--methods", "small-backup"]
    assert await asyncio.to_thread(main, words) == 0
    options = GatewayOptions("m", tuple(addresses), port=0, protection=out, method="small-backup")
    async with running(options) as (url, _, __):
        found = await load(url, second)
    assert len(found) == REQUESTS * CLIENTS
    model = open_model(teacher)
    agreement = []
    for x, y, outcome in found:
        own = (await asyncio.to_thread(model.run, {"x": x}))["output"]
        assert y.shape == own.shape
        if outcome == "direct":
            assert y.tobytes() == own.tobytes()
        else:
            assert outcome == "decoded"
            agreement.append((own.argmax(1) == y.argmax(1)).mean())
    assert np.mean(agreement) > 0.8
