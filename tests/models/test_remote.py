"""A model that a server has: what is read of it, and what it answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.models import ModelSource, open_model
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check

TENSORS = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [
        {"name": "y", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "word", "datatype": "BYTES", "shape": [-1, 1]},
    ],
}
METADATA = {"name": "m", "platform": "fake", **TENSORS}
WEIGHTS = np.array([[1, 2], [3, -4], [-5, 6]], np.float64)  # exact, however rows are split


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    metadata: Any = METADATA
    as_json = False
    json_alone = False
    misunderstood = 0
    hangs_up = 0
    most = 8
    weights = WEIGHTS
    asked: tuple[int, ...] = ()
    token = ""

    def parse_request(self) -> bool:
        good = super().parse_request()
        if good and self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self._send(401, b"who are you?")
            return False
        return good

    def _send(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if length is not None:
            self.send_header("Inference-Header-Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send(404 if self.metadata is None else 200, json.dumps(self.metadata).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if type(self).hangs_up:
            type(self).hangs_up -= 1
            self.close_connection = True
            return
        length = int(self.headers["Inference-Header-Content-Length"] or len(body))
        if self.json_alone and (
            length < len(body) or self.headers["Content-Type"] != "application/json"
        ):
            type(self).misunderstood += 1
            self._send(422, b'{"error": "no JSON"}')
            return
        (tensor,) = json.loads(body[:length])["inputs"]
        data = tensor.get("data", np.frombuffer(body[length:], "<f4"))
        x = np.array(data, np.float32).reshape(tensor["shape"])
        if len(x) > self.most or (x < 0).any():
            self._send(400, b'{"error": "too many, or negative"}')
            return
        type(self).asked += (len(x),)
        y = (x @ self.weights).astype(np.float32)
        told: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": list(y.shape)}
        word: dict[str, Any] = {"name": "word", "datatype": "BYTES", "shape": [len(x), 1]}
        if self.as_json:
            told["data"], word["data"] = y.ravel().tolist(), ["w"] * len(x)
            self._send(200, json.dumps({"outputs": [word, told]}).encode())
            return
        words = b"\x01\0\0\0w" * len(x)
        told["parameters"] = {"binary_data_size": y.nbytes}
        word["parameters"] = {"binary_data_size": len(words)}
        head = json.dumps({"outputs": [word, told]}).encode()
        self._send(200, head + words + y.tobytes(), len(head))

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def server(**changed: Any) -> Iterator[tuple[str, type[Handler]]]:
    kind = type("Changed", (Handler,), changed)
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as found:
        found.daemon_threads = True
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/v2/models/m", kind
        found.shutdown()
        thread.join()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_servers_model_is_a_model(as_json: bool) -> None:
    x = np.random.default_rng(0).random((3, 3), np.float32)
    with server(as_json=as_json) as (url, kind):
        model = open_model(url)
        found = model.run({"x": x})
        assert list(found) == ["y"]  # texts are nothing that is computed with
        assert found["y"] == pytest.approx(x @ WEIGHTS)
        kind.hangs_up = 1  # a kept connection that was closed
        assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)
        signature = model.signature
        assert signature.scores is not None
        assert (signature.scores.output, signature.scores.kind) == ("y", "logits")
        assert model.source.digest == open_model(url).source.digest
        with pytest.raises(UserError, match=r"status 400: .*too many"):
            model.run({"x": -x})


def test_a_server_that_takes_json_alone_is_asked_so() -> None:
    x = np.random.default_rng(0).random((8, 3), np.float32)
    with server(as_json=True, json_alone=True) as (url, kind):
        model = open_model(url)
        for _ in range(3):
            assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)
        with pytest.raises(UserError, match=r"status 400: .*negative"):
            model.run({"x": -x})
        assert kind.misunderstood == 1


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 40])
def test_more_queries_than_a_server_takes_are_asked_in_turn(most: int) -> None:
    x = np.random.default_rng(0).random((33, 3), np.float32)
    with server(most=most) as (url, kind):
        model = open_model(url)
        for _ in range(2):
            kind.asked = ()
            assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)
        assert sum(kind.asked) == 33
        assert min(most, 33) / 2 < max(kind.asked) <= most
        kind.asked = ()
        with pytest.raises(UserError, match="negative"):
            model.run({"x": -x})
        assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)
        assert min(most, 33) / 2 < max(kind.asked)  # an error of another kind changes nothing


def test_shapes_that_a_server_leaves_open_are_told() -> None:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
    with server(metadata={**METADATA, "inputs": inputs}) as (url, _):
        with pytest.raises(UserError, match="as the input x:FP32:SHAPE"):
            open_model(url)
        assert open_model(url, inputs=("x:FP32:3",)).signature.inputs[0].shape == (3,)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (None, "HTTP status 404"),
        ([], "does not speak the Open Inference Protocol"),
        ({"name": "m", "inputs": [{}], "outputs": []}, "does not speak the Open Inference"),
        ({**METADATA, "inputs": TENSORS["outputs"]}, "string inputs are not supported"),
    ],
)
def test_what_is_no_such_server_is_refused(metadata: Any, told: str) -> None:
    with server(metadata=metadata) as (url, _), pytest.raises(UserError, match=told):
        open_model(url)


def test_a_server_gets_its_token(tmp_path: Path) -> None:
    x, file = np.ones((2, 3), np.float32), tmp_path / "token"
    file.write_text("secret")
    with server(token="secret") as (url, kind):
        with pytest.raises(UserError, match=r"status 401: who are you\? \(--model-token-file"):
            open_model(url)
        model = ModelSource(url, token_file=str(file)).open()
        assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)
        kind.token = "renewed"
        with pytest.raises(UserError, match="status 401"):
            model.run({"x": x})
        file.write_text("renewed")
        assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)
        file.write_text("")  # it is being written
        assert model.run({"x": x})["y"] == pytest.approx(x @ WEIGHTS)


def test_urls_that_are_none() -> None:
    for url, told in (
        ("http://127.0.0.1:9/v2/models/m", "does not answer: .*refused"),
        ("http://127.0.0.1:9", "is not http://HOST:PORT/v2/models/NAME"),
        ("http://a:b/v2/models/m", "is no URL"),
        ("http://a..b:8000/v2/models/m", "'a..b' is no host's name"),
    ):
        with pytest.raises(UserError, match=told):
            open_model(url)


def test_serve_says_who_stands_before_servers() -> None:
    with pytest.raises(UserError, match="codedinvnet gateway stands in front of it"):
        check(ServeOptions(source="http://127.0.0.1:9/v2/models/m"))
