"""Two replicas of real, unchanged servers: one is stopped, the other killed, and nobody notices."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.processes import running
from codedinvnet.hedging import HedgingTransport
from codedinvnet.net.listening import free_port
from tests.nightly.servers import (
    MLSERVER,
    FastAPI,
    LitServe,
    LlamaCpp,
    MLServer,
    RayServe,
    Replica,
    Transformers,
    TritonServer,
)

pytestmark = pytest.mark.nightly

KINDS: list[type[Replica]] = [FastAPI, LitServe, RayServe, MLServer, TritonServer]
ENGINES: list[type[Replica]] = [Transformers, LlamaCpp]
CLIENTS = 4
WAIT = 30.0
"""Seconds that a client waits: longer than any fault, whatever else the machine does."""


@pytest.fixture(scope="module", params=[*KINDS, *ENGINES], ids=lambda kind: kind.__name__)
def replicas(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Replica]]:
    kind: type[Replica] = request.param
    if not kind.needs.exists():
        pytest.skip(f"{kind.__name__} is not installed: see tests/get_servers.sh")
    with ExitStack() as stack:
        yield two(kind, tmp_path_factory.mktemp(kind.__name__), stack)


def two(kind: type[Replica], folder: Path, stack: ExitStack) -> list[Replica]:
    """Start two replicas."""
    found = [kind(folder / name) for name in "ab"]
    for replica in found:
        stack.callback(replica.kill)
        replica.start()
        replica.wait()
    return found


def command(replicas: Sequence[Replica]) -> list[str]:
    """Return the command of a gateway to some replicas."""
    found = [sys.executable, "-m", "codedinvnet", "gateway", "--port", str(free_port())]
    for replica in replicas:
        found += ["--upstream", replica.url]
    found += ["--route", f"POST {replicas[0].path} hedge=on", "--health", replicas[0].health]
    if replicas[0].streams:
        found += ["--affinity", "prefix"]
    return [*found, "--deadline-ms", str(1000 * WAIT)]


@asynccontextmanager
async def client(front: str, replicas: Sequence[Replica]) -> AsyncIterator[httpx.AsyncClient]:
    urls, kind = [replica.url for replica in replicas], replicas[0]
    if front == "transport":
        transport = HedgingTransport(urls, hedge=[f"POST {kind.path}"])
        async with httpx.AsyncClient(
            transport=transport, base_url="http://model", timeout=WAIT
        ) as found:
            yield found
        return
    with running(*command(replicas), log=kind.folder.parent / "gateway.log") as gateway:
        async with httpx.AsyncClient(base_url=gateway.address, timeout=WAIT) as found:
            yield found


async def load(asking: httpx.AsyncClient, kind: Replica, over: asyncio.Event) -> Counter[str]:
    """Send requests until it is over; count what became of them."""
    told: Counter[str] = Counter()

    async def some(first: int) -> None:
        number = first
        while not over.is_set():
            number += CLIENTS
            try:
                reply = await asking.post(
                    kind.path, content=kind.body(number), headers=kind.headers
                )
            except httpx.HTTPError as error:
                told[f"{type(error).__name__}: {error}"] += 1
                continue
            if reply.status_code != 200:
                told[f"{reply.status_code}: {reply.text[:200]}"] += 1
            else:
                told["right" if kind.is_right(number, reply.content) else "wrong"] += 1
            await asyncio.sleep(0.02)

    await asyncio.gather(*(some(i) for i in range(CLIENTS)))
    return told


@pytest.mark.parametrize("front", ["gateway", "transport"])
async def test_a_stop_and_a_kill_lose_nothing(front: str, replicas: list[Replica]) -> None:
    first, second = replicas
    over = asyncio.Event()
    async with client(front, replicas) as asking:
        loading = asyncio.create_task(load(asking, first, over))
        try:
            await asyncio.sleep(3)
            first.signal(signal.SIGSTOP)
            await asyncio.sleep(3)
            first.signal(signal.SIGCONT)
            await asyncio.sleep(2)
            second.kill()
            await asyncio.sleep(3)
            second.start()
            await asyncio.to_thread(second.wait)
            await asyncio.sleep(2)
        finally:
            over.set()
        told = await loading
    print(front, type(first).__name__, dict(told))
    cut = sum(told.values()) - told["right"]  # streams that had begun where the server was killed
    assert told["wrong"] == 0
    assert cut <= (CLIENTS if first.streams else 0)
    assert told["right"] > 100


KSERVE = """
import asyncio, json, sys, time
import numpy as np
from kserve import InferInput, InferRequest, InferenceRESTClient, RESTConfig

async def main(url):
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=30))
    assert await client.is_model_ready(url, "affine")
    print("asking", flush=True)
    right = 0
    async def ask(first):
        nonlocal right
        for number in range(first, 200, 4):
            x = InferInput("x", [1, 1], "FP32")
            x.set_data_from_numpy(np.full((1, 1), number, np.float32), binary_data=False)
            request = InferRequest("affine", [x], request_id=str(number))
            reply = await client.infer(url, request, model_name="affine")
            (y,) = reply.outputs
            right += reply.id == str(number) and y.as_numpy().tolist() == [[3 * number + 1]]
            await asyncio.sleep(0.03)
    await asyncio.gather(*(ask(i) for i in range(4)))
    print(right)

asyncio.run(main(sys.argv[1]))
"""


def test_kserves_client_loses_nothing_when_a_server_stops(tmp_path: Path) -> None:
    if not MLServer.needs.exists():
        pytest.skip("MLServer and KServe's client are not installed: see tests/get_servers.sh")
    with ExitStack() as stack:
        replicas = two(MLServer, tmp_path, stack)
        gateway = stack.enter_context(running(*command(replicas), log=tmp_path / "gateway.log"))
        python = MLSERVER / "client" / "bin" / "python"
        asking = subprocess.Popen(
            [python, "-c", KSERVE, gateway.address], stdout=subprocess.PIPE, text=True
        )
        stack.callback(asking.kill)
        assert asking.stdout is not None
        assert asking.stdout.readline() == "asking\n"
        for number in (signal.SIGSTOP, signal.SIGCONT):
            time.sleep(1.5)
            replicas[0].signal(number)
        replicas[1].kill()
        assert asking.communicate(timeout=120)[0].splitlines()[-1] == "200"


@pytest.mark.parametrize("kind", ENGINES)
def test_chats_go_on_when_their_replica_is_killed(kind: type[Replica], tmp_path: Path) -> None:
    """OpenAI's client holds chats of several turns; what it gets is what a replica alone says."""
    if not kind.needs.exists():
        pytest.skip(f"{kind.__name__} is not installed: see tests/get_servers.sh")
    with ExitStack() as stack:
        replicas = two(kind, tmp_path, stack)
        gateway = stack.enter_context(running(*command(replicas), log=tmp_path / "gateway.log"))
        through, alone = (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            for url in (gateway.address, replicas[1].url)
        )
        model = json.loads(replicas[0].body(0))["model"]
        chats = [[{"role": "user", "content": f"chat {number}"}] for number in range(4)]
        for turn in range(6):
            if turn == 3:
                replicas[0].kill()
            for chat in chats:
                said, wanted = (ask(client, model, chat) for client in (through, alone))
                assert said == wanted != ""
                chat += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": f"and {turn}?"},
                ]


def ask(client: openai.OpenAI, model: str, chat: Sequence[dict[str, str]]) -> str:
    """Return what a model says, which comes as a stream."""
    asked: dict[str, Any] = {"model": model, "messages": chat, "max_tokens": 8, "temperature": 0}
    parts = client.chat.completions.create(**asked, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
