"""The gateway in front of real gRPC servers: clients see what they see without it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from benchmarks.processes import Running, running
from codedinvnet.net.listening import free_port
from tests.processes import served
from tests.triton import MODEL, Triton, is_installed

grpc = pytest.importorskip("tritonclient.grpc")
FACTORY = """
import torch

class Affine(torch.nn.Module):
    def forward(self, x):
        return 3 * x + 1

def affine():
    return Affine(), torch.zeros(1, 4)
"""


class Server(NamedTuple):
    address: str
    kill: Callable[[], None]


@pytest.fixture(params=["serve", "triton"])
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Server]]:
    """Two servers of one model."""
    with ExitStack() as stack:
        found = []
        for name in "ab":
            port = free_port()
            if request.param == "serve":
                (tmp_path / "affine.py").write_text(FACTORY)
                options = ("--workers", "1", "--policy", "uncoded", "--grpc-port", str(port))
                log = tmp_path / name
                started: Running = stack.enter_context(
                    served(f"{tmp_path}/affine.py:affine", *options, log=log)
                )
                found.append(Server(f"127.0.0.1:{port}", started.process.kill))
            elif is_installed():
                triton = Triton(tmp_path / name)
                stack.callback(triton.kill)
                triton.start()
                found.append(Server(f"127.0.0.1:{triton.grpc}", triton.kill))
            else:
                pytest.skip("Triton is not installed: make triton")
        yield found


@pytest.mark.nightly(reason="it starts two services; tests/gateway has gRPC servers of its own")
def test_a_client_over_grpc_and_a_kill(servers: list[Server], tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "codedinvnet", "gateway", "--port", "0"]
    command += [word for one in servers for word in ("--upstream", f"grpc://{one.address}")]
    with running(*command, "--grpc-port", str(port), log=tmp_path / "gateway.log"):
        direct = grpc.InferenceServerClient(servers[0].address)
        through = grpc.InferenceServerClient(f"127.0.0.1:{port}")

        def ask(client: object, number: int, **how: object) -> np.ndarray:
            x = np.full((1, 4), number, np.float32)
            tensor = grpc.InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            found = client.infer(MODEL, [tensor], request_id=str(number), **how)  # type: ignore[attr-defined]
            reply = found.get_response()
            assert reply.id == str(number)
            return np.asarray(found.as_numpy(reply.outputs[0].name))

        with direct, through:
            assert through.is_server_live()
            assert through.is_model_ready(MODEL)
            own = direct.get_model_metadata(MODEL, as_json=True)
            assert through.get_model_metadata(MODEL, as_json=True) == own
            np.testing.assert_array_equal(ask(through, 7), ask(direct, 7))
            ask(through, 7, compression_algorithm="gzip")
            errors = []
            for client in (direct, through):
                with pytest.raises(InferenceServerException, match="nowhere") as error:
                    client.infer("nowhere", [])
                errors.append(error.value.status())
            assert errors[0] == errors[1]
            for number in range(100):
                if number == 30:
                    servers[1].kill()
                expected = np.full((1, 4), 3 * number + 1, np.float32)
                np.testing.assert_array_equal(ask(through, number), expected)
                time.sleep(0.002)
