"""The gateway before a real MLServer, and KServe's client: the same answers as without it.

MLServer 1.7 takes tensors over HTTP as JSON alone.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException

from benchmarks import triton
from codedinvnet.models import open_model
from codedinvnet.processes import free_port
from tests.e2e.test_triton import Gateway, calls
from tests.processes import ended, served, wait_until

INSTALLED = Path(__file__).parents[2] / ".mlserver"
pytestmark = pytest.mark.skipif(
    not (INSTALLED / "installed").exists(), reason="MLServer is not installed: make mlserver"
)
NAME = "resnet"
X = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
Y = X[:, 0, 0, :10] * np.float32(3) + np.float32(1)
SERVED = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse

class Resnet(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        if (x < 0).any():
            raise InferenceError("x must not be negative")
        y = x[:, 0, 0, :10] * np.float32(3) + np.float32(1)
        outputs = [NumpyCodec.encode_output("output", y)]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
"""
OURS = """
import torch

class Resnet(torch.nn.Module):
    def forward(self, input):
        return input[:, 0, 0, :10] * 3 + 1

def resnet():
    return Resnet(), torch.zeros(1, 3, 32, 32)
"""
CLIENT = """
import asyncio, json, sys
import numpy as np
from kserve import InferInput, InferRequest, InferenceGRPCClient, InferenceRESTClient, RESTConfig

x = np.load(sys.argv[1])

def request(binary):
    tensor = InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return InferRequest("resnet", [tensor], request_id="7")

async def ask(kind, url):
    if kind == "grpc":
        client = InferenceGRPCClient(url)
        ready = await client.is_model_ready("resnet")
        found = await client.infer(request(True))
    else:
        client = InferenceRESTClient(RESTConfig(protocol="v2"))
        ready = await client.is_model_ready("http://" + url, "resnet")
        found = await client.infer("http://" + url, request(kind == "binary"), model_name="resnet")
    (output,) = found.outputs
    await client.close()
    assert ready and found.id == "7"
    return [output.name, output.datatype, list(output.shape), output.as_numpy().tobytes().hex()]

async def main():
    return [await ask(*each) for each in json.loads(sys.argv[2])]

print("FOUND", json.dumps(asyncio.run(main())))
"""


class MLServer:
    """A server with one model, in an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.http, self.grpc = free_port(), free_port()
        settings: dict[str, Any] = {"host": "127.0.0.1", "http_port": self.http}
        settings |= {"grpc_port": self.grpc, "metrics_port": free_port(), "parallel_workers": 0}
        tensors: dict[str, Any] = {
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
            "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}],
        }
        model = {"name": NAME, "implementation": "served.Resnet", **tensors}
        (folder / "served.py").write_text(SERVED)
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(model))
        with (folder / "log").open("wb") as log:
            command = [str(INSTALLED / "server" / "bin" / "mlserver"), "start", str(folder)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        self.log = folder / "log"

    def is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.http}/v2/models/{NAME}/ready"
        try:
            with urllib.request.urlopen(url, timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLServer]:
    found = MLServer(tmp_path_factory.mktemp("mlserver"))
    with ended(found.process):
        assert wait_until(found.is_ready, 120), found.log.read_text()[-2000:]
        yield found


@pytest.fixture(scope="module")
def gateway(server: MLServer) -> Iterator[Gateway]:
    """Each transport is a detour for half of the requests: idle upstreams are asked by turns."""
    urls = f"http://127.0.0.1:{server.http}", f"grpc://127.0.0.1:{server.grpc}"
    with Gateway(*urls, name=NAME, slots=1) as found:
        yield found


def tensors(module: Any, x: np.ndarray = X, **how: Any) -> list[Any]:
    tensor = module.InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, **how)
    return [tensor]


def outputs(module: Any) -> list[Any]:
    how = {} if module is triton_grpc else {"binary_data": False}
    return [module.InferRequestedOutput("output", **how)]


def one(module: Any, **how: Any) -> Callable[[str], Any]:
    def ask(url: str) -> Any:
        with module.InferenceServerClient(url) as client:
            return client.infer(NAME, tensors(module, **how), outputs=outputs(module))

    return ask


def another(module: Any, kind: Any) -> Callable[[str], Any]:
    async def ask(url: str) -> Any:
        async with kind(url) as client:
            if module is triton_grpc:
                return await client.infer(NAME, tensors(module), outputs=outputs(module))
            asked = tensors(module, binary_data=False)
            headers = {"Content-Type": "application/json"}  # or MLServer does not take it for JSON
            return await client.infer(NAME, asked, outputs=outputs(module), headers=headers)

    return lambda url: asyncio.run(ask(url))


@pytest.mark.parametrize(
    ("ask", "over"),
    [
        (one(triton_http, binary_data=False), "http"),
        (one(triton_grpc), "grpc"),
        (another(triton_http, triton_http_aio.InferenceServerClient), "http"),
        (another(triton_grpc, triton_grpc_aio.InferenceServerClient), "grpc"),
    ],
    ids=["HTTP", "gRPC", "asyncio HTTP", "asyncio gRPC"],
)
def test_tritons_clients(
    ask: Callable[[str], Any], over: str, server: MLServer, gateway: Gateway
) -> None:
    wanted = ask(f"127.0.0.1:{getattr(server, over)}").as_numpy("output")
    assert wanted.tobytes() == Y.tobytes()
    for _ in range(2):  # so that both ways are gone
        found = ask(getattr(gateway, over)).as_numpy("output")
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()


def check_kserves_client(server: Any, ways: list[str], gateway: Gateway, folder: Path) -> None:
    """Ask by KServe's client, directly and twice through a gateway."""
    np.save(folder / "x.npy", X)
    (folder / "client.py").write_text(CLIENT)
    grpc = f"127.0.0.1:{server.grpc}", gateway.grpc
    http = f"127.0.0.1:{server.http}", gateway.http
    direct, through = (
        [(way, (grpc if way == "grpc" else http)[i]) for way in ways] for i in (0, 1)
    )
    command = [str(INSTALLED / "client" / "bin" / "python"), str(folder / "client.py")]
    command += [str(folder / "x.npy"), json.dumps([*direct, *through, *through])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found == 3 * len(ways) * [["output", "FP32", [2, 10], Y.tobytes().hex()]]
    assert all(calls(url, gateway.http) for url in gateway.options.upstream)


def test_kserves_client(server: MLServer, gateway: Gateway, tmp_path: Path) -> None:
    check_kserves_client(server, ["json", "grpc"], gateway, tmp_path)


def test_it_is_a_model_that_can_be_protected(server: MLServer) -> None:
    model = open_model(f"http://127.0.0.1:{server.http}/v2/models/{NAME}")
    assert model.run({"input": X})["output"] == pytest.approx(Y, rel=1e-6)


def test_a_small_backup_stands_before_it_and_on_it(server: MLServer) -> None:
    url = f"http://127.0.0.1:{server.http}"
    own = {"backup_upstream": f"{url}/v2/models/{NAME}", "policy": "small-backup"}
    with Gateway(url, name=NAME, **own) as gateway:
        found = one(triton_http, binary_data=False)(gateway.http)
    assert found.as_numpy("output") == pytest.approx(Y, rel=1e-6)


needs_triton = pytest.mark.skipif(
    not triton.is_installed(), reason="Triton is not installed: make triton"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[triton.Triton]:
    """A Triton with the same model."""
    found = triton.Triton(tmp_path / "triton", NAME, triton.RESNET_CONFIG, triton.RESNET)
    try:
        found.start()
        yield found
    finally:
        found.kill()


@needs_triton
def test_kserves_client_before_triton(other: triton.Triton, tmp_path: Path) -> None:
    urls = f"http://127.0.0.1:{other.http}", f"grpc://127.0.0.1:{other.grpc}"
    with Gateway(*urls, name=NAME, slots=1) as gateway:
        check_kserves_client(other, ["json", "binary", "grpc"], gateway, tmp_path)


@needs_triton
def test_triton_and_mlserver_behind_one_gateway(
    server: MLServer, other: triton.Triton, tmp_path: Path
) -> None:
    urls = f"http://127.0.0.1:{other.http}", f"grpc://127.0.0.1:{server.grpc}"
    with Gateway(*urls, name=NAME, slots=1) as mixed:
        check_kserves_client(other, ["json", "grpc"], mixed, tmp_path)
        other.kill()
        for _ in range(5):
            found = one(triton_grpc)(mixed.grpc).as_numpy("output")
            assert found.tobytes() == Y.tobytes()


@needs_triton
def test_all_three_behind_one_gateway(
    server: MLServer, other: triton.Triton, tmp_path: Path
) -> None:
    """Who answers with other bits than the others would be seen."""
    (tmp_path / "resnet.py").write_text(OURS)
    options = ("--workers", "2", "--deadline-ms", "30000")
    with served(f"{tmp_path}/resnet.py:resnet", *options, log=tmp_path / "log") as ours:
        urls = ours.address, f"http://127.0.0.1:{other.http}", f"grpc://127.0.0.1:{server.grpc}"
        with Gateway(*urls, name=NAME, slots=1) as mixed:
            for way, url in ((triton_http, mixed.http), (triton_grpc, mixed.grpc)) * 6:
                with way.InferenceServerClient(url) as client:
                    wanted = [way.InferRequestedOutput("output")]
                    found = client.infer(NAME, tensors(way), outputs=wanted)
                    assert found.as_numpy("output").tobytes() == Y.tobytes()
            assert all(calls(url, mixed.http) >= 2 for url in urls)


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_errors_are_mlservers_own(over: str, server: MLServer, gateway: Gateway) -> None:
    module: Any = triton_http if over == "http" else triton_grpc

    def told(url: str, client: Any) -> tuple[str, str | None]:
        how = {} if over == "grpc" else {"binary_data": False}
        with client, pytest.raises(InferenceServerException) as error:
            client.infer(NAME, tensors(module, -X, **how))
        return error.value.message(), error.value.status()

    urls = f"127.0.0.1:{getattr(server, over)}", getattr(gateway, over)
    wanted, *found = (told(url, module.InferenceServerClient(url)) for url in (*urls, urls[1]))
    assert "x must not be negative" in wanted[0]
    for message, _ in found:
        assert "x must not be negative" in message
    assert wanted in found
