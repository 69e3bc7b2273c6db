"""The gateway before real Tritons: clients see what they see without it, and lose nothing."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException

from benchmarks.gateway import running as command
from benchmarks.triton import MODEL, Triton, is_installed
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.run import running
from tests.processes import wait_until

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="Triton is not installed: tools/get_triton.sh"
)
X = np.random.default_rng(0).random((3, 50), np.float32)
WORDS = np.array([[b"one"], [b""], ["ä".encode()]], object)
REQUESTS, CLIENTS = 250, 4


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


@pytest.fixture(scope="module")
def gateway(tritons: list[Triton]) -> Iterator[Gateway]:
    """Each transport is a detour for half of the requests."""
    http, grpc = f"http://127.0.0.1:{tritons[0].http}", f"grpc://127.0.0.1:{tritons[1].grpc}"
    with Gateway(http, grpc, slots=1, routing="round-robin") as found:
        yield found


def tensors(module: Any, x: np.ndarray = X, **how: Any) -> list[Any]:
    found = []
    for name, array, datatype in (("x", x, "FP32"), ("word", WORDS, "BYTES")):
        tensor = module.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, **how)
        found.append(tensor)
    return found


def check_same(ask: Callable[[str], Any], direct: str, gateway: str) -> None:
    """Two requests, so that both upstreams are asked."""
    wanted = ask(direct)
    for _ in range(2):
        found = ask(gateway)
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

    wanted = told(direct)
    for _ in range(2):
        assert told(gateway.http if http else gateway.grpc) == wanted


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


def test_a_strangers_path(tritons: list[Triton]) -> None:
    """As docs/gateway.md has it: one command, and an upstream that is killed."""
    http, grpc = f"http://127.0.0.1:{tritons[0].http}", f"grpc://127.0.0.1:{tritons[1].grpc}"
    with (
        command(http, grpc) as gateway,
        triton_http.InferenceServerClient(gateway.http) as client,
        triton_grpc.InferenceServerClient(gateway.grpc) as other,
    ):

        def ask() -> None:
            for asked, module in ((client, triton_http), (other, triton_grpc)):
                found = asked.infer(MODEL, tensors(module)).as_numpy("y")
                np.testing.assert_array_equal(found, X * np.float32(3) + np.float32(1))

        ask()
        tritons[1].kill()
        for _ in range(20):
            ask()
        tritons[1].start()
        ask()
