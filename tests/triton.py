"""A real Triton server, where `tests/get_triton.sh` has installed it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

from codedinvnet.net.listening import free_port

INSTALLED = Path(__file__).parents[1] / ".triton"
START_TIMEOUT = 60.0
"""Seconds until it is ready."""
MODEL = "affine"
CONFIG = """
name: "affine"
backend: "python"
max_batch_size: 64
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] },
        { name: "word" data_type: TYPE_STRING dims: [ 1 ] optional: true } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] },
         { name: "word" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 2 } ]
"""
SOURCE = """
import sys, time
from pathlib import Path
sys.path.insert(0, NUMPY)
import numpy as np
import triton_python_backend_utils as pb

HERE = Path(__file__).parent

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        if (HERE / "slow").exists():
            time.sleep(0.2)
        x = pb.get_input_tensor_by_name(request, "x").as_numpy()
        word = pb.get_input_tensor_by_name(request, "word")
        if (HERE / "broken").exists():
            error = pb.TritonError("out of memory", pb.TritonError.INTERNAL)
            return pb.InferenceResponse(error=error)
        if (x < 0).any():
            error = pb.TritonError("x must not be negative", pb.TritonError.INVALID_ARG)
            return pb.InferenceResponse(error=error)
        words = np.array([[b"none"]] * len(x), object) if word is None else word.as_numpy()
        y = x * np.float32(3) + np.float32(1)
        return pb.InferenceResponse([pb.Tensor("y", y), pb.Tensor("word", words)])
"""


def is_installed() -> bool:
    """Tell whether there is a Triton."""
    return (INSTALLED / "installed").exists()


class Triton:
    """A server with one model.

    Args:
        folder: where its model and its log are.
        config: the model's settings.
    """

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.folder = folder
        self.model = folder / "models" / MODEL / "1"
        self.model.mkdir(parents=True)
        (self.model.parent / "config.pbtxt").write_text(config)
        source = SOURCE.replace("NUMPY", repr(str(INSTALLED / "numpy")))
        (self.model / "model.py").write_text(source)
        self.http, self.grpc = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it is ready.

        Triton 2.51 crashes in some starts after it was killed (a `lock_exception` of its backend's
        shared memory). It is started again then, as an orchestrator would.
        """
        end = time.monotonic() + START_TIMEOUT
        self._launch()
        while not self.is_ready():
            if time.monotonic() > end:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            if self.process is not None and self.process.poll() is not None:
                self._launch()
            time.sleep(0.05)

    def _launch(self) -> None:
        server = INSTALLED / "pytriton" / "tritonserver"
        settings = {
            "model-repository": self.folder / "models",
            "backend-directory": server / "backends",
            "http-address": "127.0.0.1",
            "http-port": self.http,
            "grpc-address": "127.0.0.1",
            "grpc-port": self.grpc,
            "allow-metrics": "false",
            "exit-timeout-secs": 1,
        }
        command = [str(server / "bin" / "tritonserver"), "--disable-auto-complete-config"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        libraries = (INSTALLED / "installed").read_text().strip()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "LD_LIBRARY_PATH": libraries},
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.http}/v2/models/{MODEL}/ready"
        try:
            with urllib.request.urlopen(url, timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Send a signal to the server; of its model's processes' being stopped it crashes."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it, and its model's processes, as a crash does."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have crashed
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
