"""The gateway before real Tritons: clients see what they see without it, and lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException

from benchmarks.triton import MODEL, RESNET, RESNET_CONFIG, Triton, is_installed
from codedinvnet.processes import free_port
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.run import running
from tests.processes import wait_until

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="Triton is not installed: tools/get_triton.sh"
)
X = np.random.default_rng(0).random((3, 50), np.float32)
WORDS = np.array([[b"one"], [b""], ["ä".encode()]], object)
REQUESTS, CLIENTS = 120, 4


class Gateway:
    """A gateway in a thread of this process."""

    def __init__(self, *upstreams: str, **options: Any) -> None:
        settings = {"name": MODEL, "port": 0, "grpc_port": 0, **options}
        self.options = GatewayOptions(upstream=upstreams, **settings)
        self._started, self._loop = threading.Event(), asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def run() -> None:
            try:
                async with running(self.options) as (address, relay, port):
                    self.http = address.removeprefix("http://")
                    self.grpc, self.relay = f"127.0.0.1:{port}", relay
                    self._started.set()
                    await self._stop.wait()
            finally:
                self._started.set()

        self._loop.run_until_complete(run())

    def __enter__(self) -> Gateway:
        self._thread.start()
        self._started.wait()
        assert self._thread.is_alive(), "it did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def tritons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Triton]]:
    found = [Triton(tmp_path_factory.mktemp("triton")) for _ in range(3)]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Triton.start, found))
        yield found
    finally:
        for triton in found:
            triton.kill()


@pytest.fixture(scope="module", params=["http", "grpc"])
def gateway(tritons: list[Triton], request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """Each transport is a detour for clients of the other."""
    with Gateway(f"{request.param}://127.0.0.1:{getattr(tritons[0], request.param)}") as found:
        yield found


def tensors(module: Any, x: np.ndarray = X, **how: Any) -> list[Any]:
    found = []
    for name, array, datatype in (("x", x, "FP32"), ("word", WORDS, "BYTES")):
        tensor = module.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, **how)
        found.append(tensor)
    return found


def check_same(ask: Callable[[str], Any], direct: str, gateway: str) -> None:
    wanted, found = ask(direct), ask(gateway)
    for name in ("y", "word"):
        a, b = wanted.as_numpy(name), found.as_numpy(name)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes() or (a == b).all()
    np.testing.assert_array_equal(found.as_numpy("y"), X * np.float32(3) + np.float32(1))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("packing", [None, "gzip"])
def test_http(tritons: list[Triton], gateway: Gateway, binary: bool, packing: str | None) -> None:
    def ask(url: str) -> Any:
        outputs = [
            triton_http.InferRequestedOutput(name, binary_data=binary) for name in ("y", "word")
        ]
        with triton_http.InferenceServerClient(url) as client:
            return client.infer(
                MODEL,
                tensors(triton_http, binary_data=binary),
                outputs=outputs,
                request_id="7",
                request_compression_algorithm=packing,
                response_compression_algorithm=packing,
            )

    check_same(ask, f"127.0.0.1:{tritons[0].http}", gateway.http)


def test_grpc(tritons: list[Triton], gateway: Gateway) -> None:
    def ask(url: str) -> Any:
        with triton_grpc.InferenceServerClient(url) as client:
            return client.infer(MODEL, tensors(triton_grpc), request_id="7")

    check_same(ask, f"127.0.0.1:{tritons[0].grpc}", gateway.grpc)


def test_asyncio(tritons: list[Triton], gateway: Gateway) -> None:
    def asking(module: Any, kind: Any) -> Callable[[str], Any]:
        async def ask(url: str) -> Any:
            async with kind(url) as client:
                return await client.infer(MODEL, tensors(module))

        return lambda url: asyncio.run(ask(url))

    http = asking(triton_http, triton_http_aio.InferenceServerClient)
    check_same(http, f"127.0.0.1:{tritons[0].http}", gateway.http)
    rpc = asking(triton_grpc, triton_grpc_aio.InferenceServerClient)
    check_same(rpc, f"127.0.0.1:{tritons[0].grpc}", gateway.grpc)


def test_what_clients_ask_besides(tritons: list[Triton], gateway: Gateway) -> None:
    with triton_http.InferenceServerClient(gateway.http) as client:
        with triton_http.InferenceServerClient(f"127.0.0.1:{tritons[0].http}") as direct:
            assert client.get_model_metadata(MODEL) == direct.get_model_metadata(MODEL)
        assert client.is_server_live()
        assert client.is_model_ready(MODEL)
    with triton_grpc.InferenceServerClient(gateway.grpc) as client:
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{tritons[0].grpc}") as direct:
            assert client.get_model_metadata(MODEL) == direct.get_model_metadata(MODEL)
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)


@pytest.mark.parametrize("module", [triton_http, triton_grpc])
@pytest.mark.parametrize("flaw", ["negative", "name"])
def test_errors_are_the_upstreams_own(
    tritons: list[Triton], gateway: Gateway, module: Any, flaw: str
) -> None:
    http = module is triton_http
    direct = f"127.0.0.1:{tritons[0].http if http else tritons[0].grpc}"
    x = -X if flaw == "negative" else X

    def told(url: str) -> tuple[str, str | None]:
        asked = tensors(module, x)
        if flaw == "name":
            asked[0] = module.InferInput("z", list(X.shape), "FP32")
            asked[0].set_data_from_numpy(X)
        with (
            module.InferenceServerClient(url) as client,
            pytest.raises(InferenceServerException) as error,
        ):
            client.infer(MODEL, asked)
        return error.value.message(), error.value.status()

    assert told(gateway.http if http else gateway.grpc) == told(direct)


def load(gateway: Gateway, requests: int = REQUESTS) -> None:
    """Send requests from several clients over both transports; each answer must be right."""

    def some(number: int) -> None:
        module: Any = triton_http if number % 2 else triton_grpc
        url = gateway.http if number % 2 else gateway.grpc
        with module.InferenceServerClient(url) as client:
            for i in range(requests // CLIENTS):
                x = np.full((1, 20), number * 1000 + i, np.float32)
                tensor = module.InferInput("x", list(x.shape), "FP32")
                tensor.set_data_from_numpy(x)
                found = client.infer(MODEL, [tensor]).as_numpy("y")
                np.testing.assert_array_equal(found, x * np.float32(3) + np.float32(1))
                time.sleep(0.002)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(some, range(CLIENTS)))


def states(relay: Relay) -> list[bool]:
    return [place.up for place in relay.pool.places]


@pytest.mark.parametrize("policy", ["uncoded", "hedge"])
def test_faults_lose_nothing(tritons: list[Triton], policy: str) -> None:
    urls = [f"grpc://127.0.0.1:{tritons[0].grpc}"]
    urls += [f"http://127.0.0.1:{triton.http}" for triton in tritons[1:]]
    # No deadline of a client is in the way on a machine that does much else.
    with Gateway(*urls, policy=policy, deadline_ms=30_000, hang_timeout_ms=1000) as gateway:

        def is_up(*wanted: bool) -> bool:
            return wait_until(lambda: states(gateway.relay) == list(wanted), 30)

        load(gateway)
        broken = tritons[0].model / "broken"
        broken.touch()
        load(gateway)
        broken.unlink()
        assert is_up(True, True, True)
        slow = tritons[1].model / "slow"
        slow.touch()
        load(gateway)
        slow.unlink()
        tritons[2].signal(signal.SIGSTOP)
        try:
            load(gateway)
            assert is_up(True, True, False)
            load(gateway)
        finally:
            tritons[2].signal(signal.SIGCONT)
        assert is_up(True, True, True)
        tritons[1].kill()
        load(gateway)
        assert is_up(True, False, True)
        tritons[1].start()
        assert is_up(True, True, True)
        load(gateway)


DOC = (Path(__file__).parents[2] / "docs" / "how-to" / "gateway.md").read_text()


def printed(language: str, word: str) -> str:
    """Return the first block of the gateway's page in a language that has a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)
    found: str = next(block for block in blocks if word in block)
    return found


def calls(url: str, http: str) -> float:
    """Return how many calls of an upstream were answered, as the gateway's metrics have it."""
    line = f'codedinvnet_upstream_calls_total{{result="ok",upstream="{url}"}} '
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return float(text.split(line)[1].split()[0])


@pytest.mark.parametrize("by", ["options", "file"])
def test_a_strangers_path(by: str, tmp_path: Path) -> None:
    """As the gateway's page prints it, with other addresses: two commands, a kill nobody sees."""
    there = [Triton(tmp_path / name, "resnet", RESNET_CONFIG, RESNET) for name in "ab"]
    urls = f"http://127.0.0.1:{there[0].http}", f"grpc://127.0.0.1:{there[1].grpc}"
    http, grpc = free_port(), free_port()
    moved = {"http://a:8000": urls[0], "grpc://b:8001": urls[1], "9000": http, "9001": grpc}

    def here(text: str) -> str:
        return re.sub("|".join(moved), lambda found: str(moved[found[0]]), text)

    if by == "options":
        command = shlex.split(here(printed("bash", "pip install").splitlines()[-1]))
    else:
        (tmp_path / "gateway.json").write_text(here(printed("json", '"resnet"')))
        command = shlex.split(printed("bash", "--config"))
    assert command[:2] == ["codedinvnet", "gateway"]
    client = compile(here(printed("python", "triton")), "gateway.md", "exec")

    def infer(address: str) -> None:
        tensor = triton_http.InferInput("input", [1, 3, 32, 32], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 3, 32, 32), np.float32))
        with triton_http.InferenceServerClient(address) as direct:
            direct.infer("resnet", [tensor])

    def ask() -> None:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            exec(client, {})
        assert shown.getvalue() == f"{np.ones((1, 10), np.float32)}\n"
        x = np.zeros((1, 3, 32, 32), np.float32)
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc}") as other:
            tensor = triton_grpc.InferInput("input", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            found = other.infer("resnet", [tensor]).as_numpy("output")
            np.testing.assert_array_equal(found, np.ones((1, 10), np.float32))

    with contextlib.ExitStack() as stack:
        for triton in there:  # as a server that has been running: its first answer is slow
            stack.callback(triton.kill)
            triton.start()
            infer(f"127.0.0.1:{triton.http}")
        words = [sys.executable, "-m", "codedinvnet", *command[1:]]
        process = stack.enter_context(
            subprocess.Popen(
                words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        )
        stack.callback(process.terminate)
        assert process.stdout is not None
        assert f":{http}" in process.stdout.readline()
        ask()
        there[1].kill()
        for _ in range(20):
            ask()
        there[1].start()
        before = calls(urls[1], f"127.0.0.1:{http}")

        def is_back() -> bool:
            ask()
            return calls(urls[1], f"127.0.0.1:{http}") > before

        assert wait_until(is_back, 30)
