"""A protection of servers that run already: made from their answers, and used in front of them."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from codedinvnet.cli import main
from codedinvnet.models import open_model
from codedinvnet.models.upstream import PATH, described, outputs_of
from codedinvnet.processes import process_stat
from codedinvnet.protect import distil
from codedinvnet.serving.faces.v2 import HEADER_LENGTH
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.run import running
from tests.processes import served
from tests.protect.conftest import PLACE, queries
from tests.protect.factories import FEATURES

REQUESTS, CLIENTS = 40, 4
SOURCE = f"{PLACE}:vectors"


async def ask(session: aiohttp.ClientSession, url: str, x: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the scores and their outcome."""
    head, blobs = described({"x": x}, MODEL.signature.inputs)
    async with session.post(
        f"{url}{PATH}m/infer",
        data=b"".join([head, *blobs]),
        headers={HEADER_LENGTH: str(len(head))},
    ) as reply:
        body = await reply.read()
        assert reply.status == 200, body
        found = outputs_of(body, reply.headers[HEADER_LENGTH])
        return found["output"], reply.headers["codedinvnet-outcome"]


MODEL = open_model(SOURCE)


def family(pid: int) -> list[int]:
    """Return a process, and those that it has started."""
    found = {int(p.name): process_stat(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    below = [child for child, stat in found.items() if stat and int(stat[1]) == pid]
    return [pid, *(one for child in below for one in family(child))]


async def load(url: str, harmed: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Send requests while a server stands still; return queries, answers and outcomes."""
    found = []

    async def client(session: aiohttp.ClientSession, seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(REQUESTS):
            x = generator.random((int(generator.integers(1, 4)), FEATURES), np.float32)
            found.append((x, *await ask(session, url, x)))

    async with aiohttp.ClientSession() as session:
        stopped = family(harmed)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.gather(*(client(session, seed) for seed in range(CLIENTS)))
        finally:
            for pid in reversed(stopped):
                os.kill(pid, signal.SIGCONT)
    return found


def test_a_protection_made_of_a_running_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 20)
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(
                served(SOURCE, "--name", "m", "--workers", "1", log=tmp_path / f"{i}.log")
            )
            for i in range(2)
        )
        inputs, out = queries(tmp_path), tmp_path / "protection"
        teacher = f"{one.address}{PATH}m"
        more = ["--k", "4", "--minutes", "1", "--methods", "small-backup"]
        assert main(["protect", teacher, "--inputs", str(inputs), "--out", str(out), *more]) == 0

        async def check() -> None:
            upstreams = (one.address, two.address)
            options = GatewayOptions("m", upstreams, port=0, protection=out, method="small-backup")
            async with running(options) as (url, _, __):
                found = await load(url, two.process.pid)
            assert len(found) == REQUESTS * CLIENTS
            late = [(x, y) for x, y, outcome in found if outcome == "decoded"]
            assert late
            for x, y, outcome in found:
                own = MODEL.run({"x": x})["output"]
                assert y.shape == own.shape
                if outcome == "direct":
                    assert y.tobytes() == own.tobytes()
            agreement = [
                (MODEL.run({"x": x})["output"].argmax(1) == y.argmax(1)).mean() for x, y in late
            ]
            assert np.mean(agreement) > 0.8

        asyncio.run(check())
