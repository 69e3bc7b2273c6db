"""Real servers, unchanged: how each is started, asked and checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.processes import descendants
from codedinvnet.net.listening import free_port
from tests.triton import INSTALLED as TRITON
from tests.triton import Triton

ROOT = Path(__file__).parents[2]
SERVERS, MLSERVER, LLAMA = (ROOT / each for each in (".servers", ".mlserver", ".llama"))


class Replica(ABC):
    """A server in a process of its own, and a request that it answers.

    Attributes:
        needs: a folder; the server is not installed if it is missing.
        path: of the request.
        hedge: what the gateway is told of it.
        health: the path that says whether it is ready.
        streams: whether answers may be cut by a kill.
    """

    needs: ClassVar[Path] = ROOT
    path: ClassVar[str] = "/predict"
    health: ClassVar[str] = "/healthz"
    streams: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Write what the server needs, and return its command."""

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                list(map(str, self.command())),
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 120.0) -> None:
        """Return when it is ready, and has answered a request: the first may be slow."""
        end = time.monotonic() + seconds
        while not self._is_ready():
            if time.monotonic() > end:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        request = urllib.request.Request(self.url + self.path, self.body(1), self.headers)
        try:
            urllib.request.urlopen(self.url + self.health, timeout=1).close()
            with urllib.request.urlopen(request, timeout=20) as reply:
                return self.is_right(1, reply.read())
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Send a signal to it and all its processes."""
        assert self.process is not None
        for pid in (self.process.pid, *descendants(self.process.pid)):
            os.kill(pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    headers: ClassVar[dict[str, str]] = {"content-type": "application/json"}

    def body(self, number: int) -> bytes:
        return json.dumps({"x": number}).encode()

    def is_right(self, number: int, body: bytes) -> bool:
        return bool(json.loads(body) == {"y": 3 * number + 1})


class FastAPI(Replica):
    def command(self) -> Sequence[str | Path]:
        (self.folder / "served.py").write_text("""
import fastapi, pydantic
app = fastapi.FastAPI()

class Question(pydantic.BaseModel):
    x: int

@app.post("/predict")
async def predict(question: Question):
    return {"y": 3 * question.x + 1}

@app.get("/healthz")
def healthz():
    return "ok"
""")
        return sys.executable, "-m", "uvicorn", "served:app", "--port", str(self.port)


class LitServe(Replica):
    needs = SERVERS / "installed"
    health = "/health"

    def command(self) -> Sequence[str | Path]:
        (self.folder / "served.py").write_text(f"""
import litserve

class Affine(litserve.LitAPI):
    def setup(self, device): pass
    def decode_request(self, request): return request["x"]
    def predict(self, x): return 3 * x + 1
    def encode_response(self, y): return {{"y": y}}

if __name__ == "__main__":
    server = litserve.LitServer(Affine(), accelerator="cpu")
    server.run(host="127.0.0.1", port={self.port}, generate_client_file=False)
""")
        return SERVERS / "bin" / "python", "served.py"


class RayServe(Replica):
    health = "/-/healthz"

    def command(self) -> Sequence[str | Path]:
        (self.folder / "served.py").write_text(f"""
import time
import ray
from ray import serve

@serve.deployment(ray_actor_options={{"num_cpus": 0.1}})
class Affine:
    async def __call__(self, request):
        return {{"y": 3 * (await request.json())["x"] + 1}}

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={{"host": "127.0.0.1", "port": {self.port}}})
serve.run(Affine.bind(), route_prefix="/predict")
time.sleep(3600)
""")
        return sys.executable, "served.py"


class MLServer(Replica):
    needs = MLSERVER / "installed"
    path = "/v2/models/affine/infer"
    health = "/v2/models/affine/ready"

    def command(self) -> Sequence[str | Path]:
        settings = {"host": "127.0.0.1", "http_port": self.port, "parallel_workers": 0}
        settings |= {"grpc_port": free_port(), "metrics_port": free_port()}
        model = {"name": "affine", "implementation": "served.Affine"}
        (self.folder / "settings.json").write_text(json.dumps(settings))
        (self.folder / "model-settings.json").write_text(json.dumps(model))
        (self.folder / "served.py").write_text("""
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Affine(MLModel):
    async def load(self):
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        outputs = [NumpyCodec.encode_output("y", 3 * x + 1)]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
""")
        return MLSERVER / "server" / "bin" / "mlserver", "start", "."

    def body(self, number: int) -> bytes:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [number]}
        return json.dumps({"id": str(number), "inputs": [tensor]}).encode()

    def is_right(self, number: int, body: bytes) -> bool:
        found = json.loads(body)
        (y,) = (each["data"] for each in found["outputs"] if each["name"] == "y")
        return bool(found.get("id", str(number)) == str(number) and y == [3 * number + 1])


class TritonServer(MLServer):
    needs = TRITON / "installed"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._own = Triton(folder / "triton")
        self._own.http = self.port

    def command(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def start(self) -> None:
        self._own.start()
        self.process = self._own.process

    def wait(self, seconds: float = 120.0) -> None:
        while not self._is_ready():
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Send a signal to the server alone: its stub's stops are a test of their own."""
        self._own.signal(number)

    def kill(self) -> None:
        self._own.kill()


class Transformers(Replica):
    """OpenAI's protocol; greedy, so that a prompt has one right answer."""

    needs = SERVERS / "installed"
    path = "/v1/chat/completions"
    health = "/health"
    streams = True
    right: ClassVar[dict[int, str]] = {}

    def command(self) -> Sequence[str | Path]:
        model = self.folder.parent / "tiny"
        if not model.exists():
            command = [SERVERS / "bin" / "python", Path(__file__).parent / "tiny_model.py", model]
            subprocess.run(command, check=True, capture_output=True)
        program = SERVERS / "bin" / "transformers"
        own = ("--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu")
        return program, "serve", *own, model

    def body(self, number: int) -> bytes:
        messages = [{"role": "user", "content": f"question {number % 7}"}]
        asked: dict[str, Any] = {"model": str(self.folder.parent / "tiny"), "messages": messages}
        return json.dumps({**asked, "max_tokens": 8, "temperature": 0, "stream": True}).encode()

    def is_right(self, number: int, body: bytes) -> bool:
        lines = body.decode().splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        ended = [choice.get("finish_reason") for choice in choices][-1] == "length"
        return ended and self.right.setdefault(number % 7, text) == text


class LlamaCpp(Transformers):
    """llama.cpp's library behind its server in Python."""

    needs = LLAMA / "installed"
    health = "/v1/models"
    right: ClassVar[dict[int, str]] = {}

    def command(self) -> Sequence[str | Path]:
        program, model = LLAMA / "bin" / "python", self.folder.parent / "tiny"
        if not model.exists():
            command = [program, Path(__file__).parent / "tiny_gguf.py", model]
            subprocess.run(command, check=True, capture_output=True)
        # Or a stream ends where another request comes.
        whole = ("--interrupt_requests", "False")
        own = ("--host", "127.0.0.1", "--port", str(self.port), "--n_ctx", "1024")
        return program, "-m", "llama_cpp.server", *own, *whole, "--model", model
