"""A running service's last inputs become a protection, with its token and in memory."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from codedinvnet.errors import UserError
from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.serving.capture import SLICE, Capture
from codedinvnet.serving.faces import http
from codedinvnet.serving.faces.http import AppOptions, build_app
from codedinvnet.serving.options import ServeOptions, check
from codedinvnet.serving.serve import make_service, running
from codedinvnet.serving.service import Request
from tests.conftest import Command
from tests.observing import set_proxy
from tests.protect.conftest import PLACE
from tests.protect.factories import FEATURES

POOL = "examples/my_pool.py:Pool"
KEPT = 300
TOKEN = "something-secret"


def signature(*specs: TensorSpec) -> Signature:
    return Signature(specs, ())


def fetched(capture: Capture) -> dict[str, np.ndarray]:
    """Return what a capture's file holds."""
    with np.load(io.BytesIO(b"".join(capture.file())), allow_pickle=False) as found:
        return dict(found)


def test_the_last_inputs_are_kept_in_their_order() -> None:
    sizes = [3, 1, 4, 12, 2, 7, 5]
    for count in (1, 4, 5, 100):
        capture = Capture(
            signature(TensorSpec("a", "FP32", (2,)), TensorSpec("b", "INT64", ())), count
        )
        assert fetched(capture)["a"].shape == (0, 2)
        number = 0
        for size in sizes:
            b = np.arange(number, number + size)
            capture.keep({"a": np.stack([b, -b], 1).astype(np.float32), "b": b})
            number += size
            found = fetched(capture)
            assert sorted(found) == ["a", "b"]
            assert found["b"].tolist() == list(range(max(0, number - count), number))
            assert found["a"][:, 1].tolist() == [-v for v in found["b"].tolist()]


def test_a_file_is_made_in_slices_of_what_was_kept_when_it_began() -> None:
    """It takes little memory beside what is kept, and a service that goes on does not change it."""
    capture = Capture(signature(TensorSpec("x", "FP32", (1000,)), TensorSpec("y", "INT8", ())), 999)
    for number in range(999):
        rows = np.full((1, 1000), number, np.float32)
        capture.keep({"x": rows, "y": np.zeros(1, np.int8)})
        rows[:] = -1  # a client's tensor is its request's alone
    slices = capture.file()
    parts = [next(slices)]
    capture.keep({"x": np.full((999, 1000), -1, np.float32), "y": np.ones(999, np.int8)})
    parts += slices
    assert max(map(len, parts)) < 2 * SLICE < sum(map(len, parts))
    with np.load(io.BytesIO(b"".join(parts))) as found:
        assert found["x"][:, 0].tolist() == list(range(999))
        assert not found["y"].any()


def test_more_than_the_machine_holds_is_refused() -> None:
    with pytest.raises(UserError, match="--capture 1000000000000: so many inputs take"):
        Capture(signature(TensorSpec("x", "FP32", (10,))), 10**12)


def test_more_than_its_container_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codedinvnet.serving.capture.usable_memory", lambda: 4000)
    specs = signature(TensorSpec("x", "FP32", (10,)))
    Capture(specs, 100)
    with pytest.raises(UserError, match="--capture 101: so many inputs take"):
        Capture(specs, 101)


class Fetch:
    """A client of `GET /capture` that reads, or leaves, when it is told to."""

    def __init__(self, app: Any) -> None:
        self.app, self.status, self.body = app, 0, b""
        self.reads, self.began, self.leaves = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.began.set()
        await self.reads.wait()
        self.body += message["body"]

    async def run(self) -> None:
        scope = {
            "type": "http", "method": "GET", "path": "/capture", "raw_path": b"/capture",
            "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
            "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip
        await self.app(scope, self.receive, self.send)


async def test_one_client_fetches_at_a_time_and_the_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    service = make_service(
        ServeOptions(f"{PLACE}:vectors", workers=2, pool=POOL, capture=KEPT, token_file=token)
    )
    app = build_app(service, AppOptions(256), starts=False)
    large = np.random.default_rng(0).random((KEPT, FEATURES))[:256]
    tensor = {"name": "x", "shape": large.shape, "datatype": "FP32", "data": large.tolist()}
    await service.front.start()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        first, left = Fetch(app), Fetch(app)
        tasks = [asyncio.create_task(first.run())]
        await first.began.wait()
        refused = await client.get("/capture")
        assert refused.status_code == 409
        assert "another client fetches" in refused.json()["error"]
        answered = await client.post(
            f"/v2/models/{service.served.name}/infer",
            content=gzip.compress(json.dumps({"inputs": [tensor]}).encode()),
            headers={"Content-Encoding": "gzip"},  # taken in turn, as all that is large
        )
        assert answered.status_code == 200, answered.text
        first.reads.set()
        await tasks[0]
        assert first.status == 200
        with np.load(io.BytesIO(first.body)) as found:
            assert found["x"].shape == (0, FEATURES)  # what came later is of the next file
        tasks.append(asyncio.create_task(left.run()))
        await left.began.wait()
        left.leaves.set()
        await tasks[1]
        again = await client.get("/capture")
        assert again.status_code == 200
        with np.load(io.BytesIO(again.content)) as found:
            np.testing.assert_array_equal(found["x"], large.astype(np.float32))
        with monkeypatch.context() as patch:
            patch.setattr(http, "TAKEN_WITHIN", 0.2)
            await asyncio.wait_for(Fetch(app).run(), 30)  # it reads nothing, and stays
        assert (await client.get("/capture")).status_code == 200
    await service.front.stop()


def test_images_are_kept_as_bytes_however_they_came() -> None:
    capture = Capture(signature(TensorSpec("images", "UINT8", (1, 16, 16))), 2)
    image = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    capture.keep({"images": image})
    capture.keep({"images": image.astype(np.float32) / 255})
    first, second = fetched(capture)["images"]
    assert np.array_equal(first, image[0])
    assert np.array_equal(second, image[0])


def test_texts_are_not_kept() -> None:
    with pytest.raises(UserError, match="takes texts"):
        Capture(signature(TensorSpec("a", "BYTES", (1,))), 3)


def test_inputs_are_only_handed_out_for_a_token() -> None:
    with pytest.raises(UserError, match="needs --token-file"):
        check(ServeOptions(f"{PLACE}:vectors", capture=3))


def test_a_protection_from_a_running_service(call: Command, tmp_path: Path) -> None:
    tokens = {name: tmp_path / name for name in ("right", "wrong")}
    tokens["right"].write_text(TOKEN)
    tokens["wrong"].write_text("else")
    options = ServeOptions(
        f"{PLACE}:vectors", port=0, workers=2, pool=POOL, capture=KEPT, token_file=tokens["right"]
    )
    sent = np.random.default_rng(0).random((KEPT + 40, FEATURES), np.float32)

    def protect(url: str, model: str, token: str, out: str, *more: str) -> Any:
        words = ["protect", f"{PLACE}:{model}", "--capture", url, "--k", "4", "--minutes", "5"]
        words += ["--token-file", str(tokens[token]), "--out", str(tmp_path / out)]
        return call(*words, "--methods", "small-backup", *more)

    async def run() -> list[Any]:
        async with running(options) as (url, service):
            early = await asyncio.to_thread(protect, url, "vectors", "right", "a")
            for begin in range(0, len(sent), 20):
                await service.answer(
                    Request({"x": sent[begin : begin + 20]}, outputs=(("output", True),))
                )
            keep = ("--keep-inputs", str(tmp_path / "inputs.npz"))
            return [early] + [
                await asyncio.to_thread(protect, url, *what)
                for what in (
                    ("vectors", "wrong", "a"),
                    ("two_inputs", "right", "b"),
                    ("vectors", "right", "c"),
                    ("vectors", "right", "d", *keep),
                )
            ]

    early, refused, other, made, kept = asyncio.run(run())
    assert early.code == 2
    assert "--capture: 0 different inputs are too few" in early.err
    assert refused.code == 2
    assert "401: a bearer token is needed" in refused.err
    assert other.code == 2
    assert "has no input 'numbers'" in other.err
    assert made.code == 0, made.err
    found = json.loads((tmp_path / "c" / "protection.json").read_text())
    assert sum(found["split"].values()) == KEPT
    assert kept.code == 0, kept.err
    assert (tmp_path / "inputs.npz").stat().st_mode & 0o777 == 0o600
    with np.load(tmp_path / "inputs.npz") as arrays:
        assert np.array_equal(arrays["x"], sent[-KEPT:])
    for path in (tmp_path / "c").rglob("*"):  # nothing of the inputs is on the disk
        assert not path.is_file() or sent[-1].tobytes() not in path.read_bytes()


def one_array() -> bytes:
    """Return what `numpy.save` writes."""
    content = io.BytesIO()
    np.save(content, np.zeros((KEPT, FEATURES), np.float32))
    return content.getvalue()


def damaged() -> bytes:
    """Return a file of arrays whose values have changed on the way."""
    made = io.BytesIO()
    np.savez(made, x=np.zeros((50, FEATURES), np.float32))
    content = bytearray(made.getvalue())
    content[1000] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("body", "missing", "status"),
    [
        (b"0123456789", 90, 200),  # it stops while it sends
        (b"{", 90, 500),
        (b"", 0, 200),
        (b"<html>", 0, 200),
        (one_array(), 0, 200),
        (damaged(), 0, 200),
    ],
)
def test_what_is_no_file_of_arrays_is_told_in_one_line(
    body: bytes, missing: int, status: int, call: Command, tmp_path: Path
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + missing))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        words = ("--capture", f"http://127.0.0.1:{server.server_port}", "--out", tmp_path / "out")
        outcome = call("protect", f"{PLACE}:vectors", *words)
        server.shutdown()
        thread.join()
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: --capture: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--capture", "http://127.0.0.1:9", "--inputs", "x.npy"), "either --inputs or --capture"),
        ((), "either --inputs or --capture"),
        (("--capture", "127.0.0.1:9"), "is no address"),
        (("--capture", "http://127.0.0.1:port"), "cannot be read"),
        (("--capture", "http://127.0.0.1:9"), "cannot be read"),
        (("--inputs", "x.npy", "--token-file", "t"), "--token-file: goes with --capture"),
        (("--capture", "http://127.0.0.1:9", "--labels", "y"), "--labels: goes with --inputs"),
        (
            ("--capture", "http://127.0.0.1:9", "--keep-inputs", "kept"),
            "--keep-inputs: kept: --inputs reads such files as .npz alone",
        ),
        (
            ("--capture", "http://127.0.0.1:9", "--scale", "2", "--crop", "3"),
            "--crop, --scale: goes with images",
        ),
    ],
)
def test_mistakes(words: tuple[str, ...], told: str, call: Command, tmp_path: Path) -> None:
    outcome = call("protect", f"{PLACE}:vectors", "--out", str(tmp_path / "out"), *words)
    assert outcome.code == 2
    assert told in outcome.err


def test_a_service_without_one_says_so(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_proxy(monkeypatch)  # which is not asked

    async def run() -> Any:
        options = ServeOptions(f"{PLACE}:vectors", port=0, workers=2, pool=POOL)
        async with running(options) as (url, _):
            words = ("protect", f"{PLACE}:vectors", "--out", str(tmp_path / "out"))
            return await asyncio.to_thread(call, *words, "--capture", url)

    assert "404: this service keeps no inputs" in asyncio.run(run()).err
