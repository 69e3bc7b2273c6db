"""Tritons whose Python backend is stopped: the gateway gives no client another request's answer.

Triton itself does (`tests/nightly/triton_wrong_answers.py`). Between the gateway and each Triton
stands a tap that counts such answers, so that the test cannot pass because there were none.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.processes import descendants, running
from codedinvnet.net.listening import free_port
from tests.triton import CONFIG, MODEL, Triton, is_installed

grpc = pytest.importorskip("grpc")
pb = pytest.importorskip("tritonclient.grpc.service_pb2")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not is_installed(), reason="Triton is not installed: make triton"),
]

STOPS = int(os.environ.get("STOPS", "25"))
"""Of each of the eight cases."""
LEFT = 5.0
"""Seconds for which a tap waits for answers that the gateway gave up."""
INFER = "/inference.GRPCInferenceService/ModelInfer"
PATH = f"/v2/models/{MODEL}/infer"
HEADER = "inference-header-content-length"


def binary(number: int) -> tuple[bytes, dict[str, str]]:
    tensor: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 1]}
    output = {"name": "y", "parameters": {"binary_data": True}}
    head = {"id": str(number), "inputs": [{**tensor, "parameters": {"binary_data_size": 4}}]}
    text = json.dumps({**head, "outputs": [output]}).encode()
    return text + np.float32(number).tobytes(), {HEADER: str(len(text))}


def plain(number: int) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [number]}
    return json.dumps({"id": str(number), "inputs": [tensor]}).encode(), {}


def value(body: bytes, header_length: str | None, key: str) -> float | None:
    """Return x of a request, or y of an answer; None if it has none."""
    text = body if header_length is None else body[: int(header_length)]
    with suppress(ValueError, KeyError):
        tensor = next(each for each in json.loads(text)[key] if each["name"] in "xy")
        if "data" in tensor:
            return float(tensor["data"][0])
        return float(np.frombuffer(body[len(text) :], np.float32)[0])
    return None


class Messages:
    """Reads the x or y of HTTP messages that pass."""

    def __init__(self, key: str, found: Callable[[float | None], None]) -> None:
        self.key, self.found, self.data = key, found, b""

    def feed(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            lines = self.data[:end].decode("latin-1").lower().split("\r\n")[1:]
            fields = dict(line.split(": ", 1) for line in lines if ": " in line)
            length = int(fields.get("content-length", 0))
            if len(self.data) < end + 4 + length:
                return
            body, self.data = self.data[end + 4 :][:length], self.data[end + 4 + length :]
            self.found(value(body, fields.get(HEADER), self.key))


class HttpTap:
    """Passes bytes on between the gateway and a Triton; a closed connection is closed beyond."""

    def __init__(self, triton: Triton, count: Counter[str]) -> None:
        self.triton, self.count = triton, count
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> str:
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        while self.tasks:
            await end(*self.tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, beyond = await asyncio.open_connection("127.0.0.1", self.triton.http)
        except OSError:
            writer.transport.abort()
            return
        asked: deque[float | None] = deque()

        def answered(y: float | None) -> None:
            x = asked.popleft() if asked else None
            if y is not None:
                self.count[
                    "right at the border" if y == 3 * (x or 0) + 1 else "WRONG at the border"
                ] += 1

        async def pump(source: Any, sink: Any, messages: Messages) -> None:
            with suppress(OSError):
                while data := await source.read(1 << 16):
                    messages.feed(data)
                    sink.write(data)

        asking = asyncio.ensure_future(pump(reader, beyond, Messages("inputs", asked.append)))
        answering = asyncio.ensure_future(pump(there, writer, Messages("outputs", answered)))
        self.tasks |= {asking, answering}
        await asyncio.wait((asking, answering), return_when=asyncio.FIRST_COMPLETED)
        if (
            not answering.done() and asked
        ):  # what Triton answers counts, even if no client waits for it
            await asyncio.wait((answering,), timeout=LEFT)
        await end(asking, answering)
        self.tasks -= {asking, answering}
        writer.transport.abort()
        beyond.transport.abort()


async def end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class GrpcTap:
    """Passes calls on; its port is closed while the Triton behind it is."""

    def __init__(self, triton: Triton, count: Counter[str]) -> None:
        self.triton, self.count, self.port = triton, count, free_port()
        self._asking: set[asyncio.Task[bytes]] = set()

    async def __aenter__(self) -> str:
        self._following = asyncio.create_task(self._follow())
        return f"grpc://127.0.0.1:{self.port}"

    async def __aexit__(self, *_: object) -> None:
        await end(self._following, *self._asking)

    async def _follow(self) -> None:
        ready = grpc.ChannelConnectivity.READY
        while True:
            options = (("grpc.use_local_subchannel_pool", 1),)
            async with grpc.aio.insecure_channel(
                f"127.0.0.1:{self.triton.grpc}", options
            ) as self.channel:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.channel.channel_ready(), 1.0)
                if self.channel.get_state() is not ready:
                    await asyncio.sleep(0.1)
                    continue
                server = grpc.aio.server(handlers=(self._handlers(),))
                while not server.add_insecure_port(f"127.0.0.1:{self.port}"):
                    await asyncio.sleep(0.1)
                await server.start()
                try:
                    await self.channel.wait_for_state_change(ready)
                finally:
                    await server.stop(0)

    def _handlers(self) -> Any:
        class Handlers(grpc.GenericRpcHandler):  # type: ignore[name-defined,misc]
            def service(_, details: Any) -> Any:
                async def passed(message: bytes, context: Any) -> bytes:
                    return await self._passed(details.method, message, context)

                return grpc.unary_unary_rpc_method_handler(passed)

        return Handlers()

    async def _passed(self, method: str, message: bytes, context: Any) -> bytes:
        asking = asyncio.ensure_future(self._ask(method, message))
        self._asking.add(asking)
        asking.add_done_callback(self._ended)
        try:
            return await asyncio.shield(asking)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())
            raise AssertionError from error

    def _ended(self, asking: asyncio.Task[bytes]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # perhaps no client waits for it any more

    async def _ask(self, method: str, message: bytes) -> bytes:
        reply: bytes = await self.channel.unary_unary(method)(message, timeout=60)
        if method == INFER:
            x = number_of(pb.ModelInferRequest.FromString(message).raw_input_contents)
            y = number_of(pb.ModelInferResponse.FromString(reply).raw_output_contents)
            right = y == 3 * x + 1
            self.count["right at the border" if right else "WRONG at the border"] += 1
        return reply


def number_of(contents: Iterable[bytes]) -> float:
    found = np.frombuffer(next(iter(contents), b""), np.float32)
    return float(found[0]) if len(found) else math.nan


class Clients:
    """Send requests over HTTP, in binary and JSON, and over gRPC; each has its own number."""

    def __init__(self, http: str, rpc: str, count: Counter[str]) -> None:
        self.http, self.rpc, self.count, self.number = http, rpc, count, 0
        self.over = False

    def _next(self) -> int:
        self.number += 1
        return self.number

    async def over_http(self, write: Callable[[int], tuple[bytes, dict[str, str]]]) -> None:
        raw = {"accept-encoding": "identity"}  # the tap unpacks nothing
        async with httpx.AsyncClient(base_url=self.http, headers=raw, timeout=60) as client:
            while not self.over:
                number = self._next()
                body, headers = write(number)
                reply = await client.post(PATH, content=body, headers=headers)
                y = value(reply.content, reply.headers.get(HEADER), "outputs")
                await self._count(number, y, f"HTTP {reply.status_code}")

    async def over_grpc(self) -> None:
        async with grpc.aio.insecure_channel(self.rpc) as channel:
            infer = channel.unary_unary(
                INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
            )
            while not self.over:
                number = self._next()
                request = pb.ModelInferRequest(model_name=MODEL, id=str(number))
                request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
                request.raw_input_contents.append(np.float32(number).tobytes())
                try:
                    reply = await infer(request, timeout=60)
                    await self._count(number, number_of(reply.raw_output_contents), "")
                except grpc.aio.AioRpcError as error:
                    await self._count(number, None, error.code().name)

    async def _count(self, number: int, y: float | None, error: str) -> None:
        if y is None:
            self.count[error] += 1
        else:
            self.count["right at clients" if y == 3 * number + 1 else "WRONG at clients"] += 1
        await asyncio.sleep(0.01)

    async def run(self, transport: str) -> None:
        if transport == "grpc":
            await asyncio.gather(*(self.over_grpc() for _ in range(8)))
        else:
            await asyncio.gather(*(self.over_http(each) for each in (binary, plain) * 4))


def stop(triton: Triton, what: str, number: int) -> None:
    """Send a signal to a server, its stubs, or both."""
    assert triton.process is not None
    pids = {"server": [triton.process.pid], "stub": descendants(triton.process.pid)}
    for pid in {**pids, "both": [*pids["server"], *pids["stub"]]}[what]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def ejected(http: str) -> set[str]:
    with urllib.request.urlopen(f"{http}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    up = [line for line in lines if line.startswith("codedinvnet_gateway_upstream_up{")]
    return {line.split('"')[1] for line in up if line.endswith(" 0.0")}


async def mend(triton: Triton, url: str, http: str) -> None:
    """Do what an operator does: restart a Triton that crashed, or that the gateway gave up."""
    for look in range(80):
        dead = triton.process is None or triton.process.poll() is not None
        away = url in await asyncio.to_thread(ejected, http)
        if not dead and not away:
            return
        if dead or look % 8 == 4:
            await asyncio.to_thread(triton.kill)
            await asyncio.to_thread(triton.start)
        await asyncio.sleep(0.5)
    raise AssertionError(f"{url} did not come back")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize("policy", ["uncoded", "hedge"])
@pytest.mark.parametrize("both", [False, True], ids=["one", "two"])
async def test_no_client_gets_another_requests_answer(
    policy: str, both: bool, transport: str, tmp_path: Path
) -> None:
    count: Counter[str] = Counter()
    rng = random.Random(f"{policy} {both} {transport}")
    config = CONFIG.replace("count: 2", "count: 1")  # so that requests wait for one stub
    tritons = [Triton(tmp_path / name, config=config) for name in "ab"]
    async with AsyncExitStack() as stack:
        for triton in tritons:
            stack.callback(triton.kill)
            await asyncio.to_thread(triton.start)
        tap = HttpTap if transport == "http" else GrpcTap
        urls = [await stack.enter_async_context(tap(triton, count)) for triton in tritons]
        command = [sys.executable, "-m", "codedinvnet", "gateway", "--policy", policy]
        for url in urls:
            command += ["--upstream", url]
        rpc = free_port()
        command += ["--port", str(free_port()), "--slots", "8"]
        command += ["--grpc-port", str(rpc)] if transport == "grpc" else []
        with ExitStack() as processes:
            starting = running(*command, log=tmp_path / "gateway.log")
            gateway = await asyncio.to_thread(processes.enter_context, starting)
            http = gateway.address
            clients = Clients(http, f"127.0.0.1:{rpc}", count)
            asking = asyncio.create_task(clients.run(transport))
            for _ in range(STOPS):
                await asyncio.sleep(rng.uniform(0.2, 1.0))
                stopped = tritons if both else [rng.choice(tritons)]
                what = rng.choice(("stub", "stub", "server", "both"))
                for triton in stopped:
                    stop(triton, what, signal.SIGSTOP)
                    count[f"stops of {what}"] += 1
                await asyncio.sleep(rng.uniform(0.3, 4.0))
                for triton in stopped:
                    stop(triton, what, signal.SIGCONT)
                await asyncio.sleep(0.5)
                for triton, url in zip(tritons, urls, strict=True):
                    await mend(triton, url, http)
            clients.over = True
            await asking
    print(policy, both, transport, dict(count))
    assert count["WRONG at clients"] == 0
    assert count["WRONG at the border"] > 0 or STOPS < 20
    assert count["right at clients"] > 40 * STOPS
