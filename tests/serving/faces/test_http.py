"""The HTTP face without a socket: every status, and what each says."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.serving.answers import Answered
from codedinvnet.serving.faces import http as app
from codedinvnet.serving.faces.http import AppOptions, build_app
from codedinvnet.serving.faces.page import DEMO_HEADER, demo_requests
from codedinvnet.serving.faces.v2 import HEADER_LENGTH, parse_request
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.rules.settings import POLICIES, Rules
from codedinvnet.serving.served import LABEL, PROBABILITIES
from codedinvnet.serving.service import Service as Answering
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from codedinvnet.serving.workers.pool import WorkerDied
from codedinvnet.simulation.distributions import Distribution
from tests.serving.bundles import BundleFront, BundlePool

K, WORKERS = 4, 6
INFER = "/v2/models/mnist/infer"
MAX_BODY = 100_000
TOKEN = "an open secret"


@pytest.fixture(scope="module")
def mnist() -> Bundle:
    return load_bundle("mnist")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return sample_images("mnist").images[:16].numpy()


class Service:
    """A front end with its app, and a client of it."""

    def __init__(
        self,
        front: FrontEnd,
        pool: BundlePool,
        client: httpx.AsyncClient,
        started: asyncio.Task[None],
    ) -> None:
        self.front, self.pool, self.client, self.started = front, pool, client, started

    async def infer(self, images: np.ndarray, **more: Any) -> httpx.Response:
        """Send JSON; `more` replaces what stands in the request."""
        return await self.client.post(INFER, json={"inputs": [tensor(images)], **more})

    def hang_all(self) -> None:
        for worker in range(WORKERS):
            self.pool.hang(worker)

    def kill_all(self) -> None:
        for worker in range(WORKERS):
            self.pool.kill(worker)


def tensor(images: np.ndarray, **more: Any) -> dict[str, Any]:
    return {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "data": images.ravel().tolist(),
        **more,
    }


@asynccontextmanager
async def serving(
    bundle: Bundle,
    *,
    token: str = "",
    demo: np.ndarray | None = None,
    policy: str = "coded",
    deadline: float = 60.0,
    max_pending: int = 100,
    max_body: int = MAX_BODY,
    body_memory: int = 8 * MAX_BODY,
    classes: tuple[str, ...] | None = None,
    hosts: tuple[str, ...] = (),
    pool_class: type[BundlePool] = BundlePool,
    wait: bool = True,
    guarded: bool = True,
) -> AsyncIterator[Service]:
    method = scheme_for(bundle, K)
    pool = pool_class(method)
    front = BundleFront(
        method,
        FaultyPool(pool, Schedule()),
        Rules(WORKERS, POLICIES[policy], hang_timeout=60.0, max_pending=max_pending),
        classes or bundle.info.classes,
        deadline=deadline,
    )
    requests = None if demo is None else demo_requests(front.served, demo)
    made = AppOptions(32, max_body, body_memory, token, requests, hosts, guarded)
    app = build_app(Answering(front, front.served), made)
    started = asyncio.create_task(front.start())
    if wait:
        await started
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {DEMO_HEADER: "1"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", headers=headers
    ) as client:
        try:
            yield Service(front, pool, client, started)
        finally:
            await started
            for worker in range(WORKERS):
                if pool.hung[worker].is_set():
                    pool.kill(worker)
            await front.stop()


def using(bundle: Bundle, body: Callable[[Service], Awaitable[None]], **options: Any) -> None:
    """Run a test's body with a service."""

    async def run() -> None:
        async with serving(bundle, **options) as service:
            await body(service)

    asyncio.run(run())


def error(response: httpx.Response, status: int) -> str:
    """Return the message of an error response."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    message: str = response.json()["error"]
    return message


def expected(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    return bundle.classify(bundle.embed(torch.from_numpy(images))).numpy()


async def largest_gap(service: Service, work: list[Coroutine[Any, Any, Any]]) -> float:
    """Do some work; return the longest that this process kept a health check waiting meanwhile.

    It is processor time: what other processes take of a busy machine is not the service's.
    """
    working, gaps = asyncio.gather(*work), [0.0]
    while not working.done():
        began = time.process_time()
        assert (await service.client.get("/v2/health/live")).status_code == 200
        await asyncio.sleep(0.005)
        gaps.append(time.process_time() - began)
    await working
    return max(gaps)


class TestInfer:
    def test_json(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            response = await service.infer(
                images[:K], id="seven", parameters={"accept_decoded": False}
            )
            assert response.status_code == 200
            assert HEADER_LENGTH not in response.headers
            reply = response.json()
            assert (reply["model_name"], reply["model_version"]) == ("mnist", "1")
            assert reply["id"] == "seven"
            outputs = {output["name"]: output for output in reply["outputs"]}
            assert {name: output["shape"] for name, output in outputs.items()} == {
                "probabilities": [K, 10],
                "label": [K],
                "outcome": [K],
            }
            found = np.reshape(outputs["probabilities"]["data"], (K, 10))
            np.testing.assert_allclose(found, expected(mnist, images[:K]), atol=1e-5)
            assert outputs["label"]["data"] == found.argmax(1).tolist()
            assert outputs["outcome"]["data"] == ["direct"] * K

        using(mnist, body)

    def test_nested_data_and_floats(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            floats = images[:2] / 255
            inputs = [tensor(images[:2], datatype="FP32", data=floats.tolist())]
            response = await service.client.post(INFER, json={"inputs": inputs})
            assert response.status_code == 200
            first = response.json()["outputs"][0]["data"][:10]
            np.testing.assert_allclose(first, expected(mnist, images[:1])[0], atol=1e-5)

        using(mnist, body)

    def test_large_answers_do_not_stop_the_others(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        many = np.random.default_rng(0).random((256, 1000), np.float32)
        largest: list[float] = []
        responses: list[httpx.Response] = []

        async def answered(*_: Any, **__: Any) -> list[Answered]:
            label = np.zeros(1, np.int64)
            return [
                Answered({PROBABILITIES: row[None], LABEL: label}, "direct", 0.1) for row in many
            ]

        async def body(service: Service) -> None:
            monkeypatch.setattr(service.front, "infer", answered)

            async def ask() -> None:
                responses.append(await service.infer(images[:1]))

            for _ in range(3):
                largest.append(await largest_gap(service, [ask(), ask()]))

        using(mnist, body, classes=tuple(map(str, range(1000))))
        assert min(largest) < 0.2, largest  # of which the client takes its part
        for response in responses[:2]:
            assert response.headers["Content-Encoding"] == "gzip"
            found = np.float32(response.json()["outputs"][0]["data"])
            assert np.array_equal(found, many.ravel())

    def test_the_time_that_was_spent_on_workers(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            began = time.monotonic()
            response = await service.infer(images[:3])
            elapsed = 1000 * (time.monotonic() - began)
            header = response.headers["Server-Timing"]
            found = re.fullmatch(r"work;dur=([\d.]+)", header)
            assert found is not None, header
            assert 0 < float(found.group(1)) < elapsed
            times = (await service.client.get("/times")).json()
            assert set(times) >= {"service", "trip", "tasks"}
            assert sum(worker["seen"] for worker in times["tasks"] if worker) == 3
            assert Distribution.model_validate(times["service"]).mean_ms < elapsed

        # With a code the parity may be quicker than a data task.
        using(mnist, body, policy="uncoded")

    @pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
    def test_binary(self, encoding: str | None, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            entry = tensor(images, parameters={"binary_data_size": images.nbytes})
            del entry["data"]
            head = json.dumps(
                {"inputs": [entry], "parameters": {"binary_data_output": True}}
            ).encode()
            data = head + images.tobytes()
            headers = {HEADER_LENGTH: str(len(head))}
            if encoding is not None:
                headers["Content-Encoding"] = encoding
                data = gzip.compress(data) if encoding == "gzip" else zlib.compress(data)
            response = await service.client.post(INFER, content=data, headers=headers)
            assert response.status_code == 200, response.text
            assert response.headers["content-type"] == "application/octet-stream"
            length = int(response.headers[HEADER_LENGTH])
            reply = json.loads(response.content[:length])
            sizes = [output["parameters"]["binary_data_size"] for output in reply["outputs"]]
            assert sum(sizes) == len(response.content) - length
            found = np.frombuffer(response.content, "<f4", 160, length).reshape(16, 10)
            labels = np.frombuffer(response.content, "<i8", 16, length + sizes[0])
            np.testing.assert_array_equal(labels, found.argmax(1))
            outcomes = response.content[length + sizes[0] + sizes[1] :]
            assert outcomes.count(b"direct") + outcomes.count(b"decoded") == 16

        using(mnist, body)

    def test_a_large_answer_is_compressed_for_who_asks(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        async def body(service: Service) -> None:
            batch = np.repeat(images[:1], 32, axis=0)
            for asked, given in (("gzip", "gzip"), ("identity", None), ("gzip; q=0, br", None)):
                service.client.headers["Accept-Encoding"] = asked
                response = await service.infer(batch)
                assert response.headers.get("content-encoding") == given
                assert response.headers["vary"] == "Accept-Encoding"
                assert len(response.json()["outputs"][0]["data"]) == 320

        using(mnist, body)

    def test_decoded(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.pool.hang(1)
            response = await service.infer(images[:K], outputs=[{"name": "outcome"}])
            (output,) = response.json()["outputs"]
            assert output["data"] == ["direct", "decoded", "direct", "direct"]

        using(mnist, body)

    def test_guessed(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.pool.hang(1)
            service.pool.hang(3)
            response = await service.infer(
                images[:K], outputs=[{"name": "outcome"}], parameters={"timeout": 1_000_000}
            )
            (output,) = response.json()["outputs"]
            assert output["data"] == ["direct", "guessed", "direct", "guessed"]
            state = (await service.client.get("/page/state")).json()
            assert state["answers"]["guessed"] == 2

        using(mnist, body)


class TestBadRequests:
    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"name": "pictures"}, "inputs.0.name"),
            ({"name": None}, "inputs.0.name"),
            ({"datatype": "INT8"}, "inputs.0.datatype"),
            ({"shape": [1, 28, 28]}, "inputs.0.shape"),
            ({"shape": [1, 3, 28, 28]}, "inputs.0.shape"),
            ({"shape": [0, 1, 28, 28]}, "inputs.0.shape"),
            ({"shape": [33, 1, 28, 28]}, "inputs.0.shape: at most 32 queries"),
            ({"shape": "all"}, "inputs.0.shape"),
            ({"data": None}, "inputs.0.data: missing"),
            ({"data": [1, 2, 3]}, "inputs.0.data"),
            ({"data": [[1, 2], [3]]}, "inputs.0.data"),
            ({"data": [256] * 784}, "inputs.0.data"),
            ({"data": [-1] * 784}, "inputs.0.data"),
            ({"data": [0.5] * 784}, "inputs.0.data"),
            ({"data": ["a"] * 784}, "inputs.0.data"),
            ({"data": [2.0] * 784, "datatype": "FP32"}, "inputs.0.data"),
            ({"parameters": {"binary_data_size": 784}}, "inputs.0.data"),
            ({"parameters": {"binary_data_size": 3}}, "inputs.0.parameters.binary_data_size"),
            ({"parameters": {"shared_memory_region": "r"}}, "inputs.0.parameters"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
    )
    def test_input(
        self, change: dict[str, Any], field: str, mnist: Bundle, images: np.ndarray
    ) -> None:
        async def body(service: Service) -> None:
            entry = {**tensor(images[:1]), **change}
            response = await service.client.post(INFER, json={"inputs": [entry]})
            assert error(response, 400).startswith(field)
            assert not service.front.scheduler.queries

        using(mnist, body)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"inputs": []}, "inputs:"),
            ({"inputs": 3}, "inputs:"),
            ({"id": 3}, "id:"),
            ({"outputs": [{"name": "logits"}]}, "outputs.0.name"),
            ({"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]}, "outputs.0.par"),
            ({"parameters": {"accept_decoded": "no"}}, "parameters.accept_decoded"),
            ({"parameters": {"timeout": -1}}, "parameters.timeout"),
            ({"parameters": {"timeout": "long"}}, "parameters.timeout"),
            ({"outputs": [{"name": "label"}, {"name": "label"}]}, "outputs.1.name: 'label' is"),
            ({"parameters": {"binary_data_output": 1}}, "parameters.binary_data_output"),
        ],
        ids=str,
    )
    def test_request(
        self, change: dict[str, Any], field: str, mnist: Bundle, images: np.ndarray
    ) -> None:
        async def body(service: Service) -> None:
            assert error(await service.infer(images[:1], **change), 400).startswith(field)

        using(mnist, body)

    @pytest.mark.parametrize(
        ("content", "headers", "message"),
        [
            (b"", {}, "body: not valid JSON"),
            (b"{", {}, "body: not valid JSON"),
            (b"\xff\xfe", {}, "body: not valid JSON"),
            (b'{"inputs": [NaN]}', {}, "body: not valid JSON"),
            (b"[" * 10_000, {}, "body: not valid JSON"),
            (b"[]", {}, "body: must be a JSON object"),
            (b"{}", {}, "inputs: "),
            (b"{}", {HEADER_LENGTH: "two"}, f"{HEADER_LENGTH}: must be a number"),
            (b"{}", {HEADER_LENGTH: "-2"}, f"{HEADER_LENGTH}: must be a number"),
            (b"{}", {HEADER_LENGTH: "3"}, f"{HEADER_LENGTH}: 3 is more than"),
            (b"{}", {"Content-Encoding": "br"}, "Content-Encoding: 'br'"),
            (b"{}", {"Content-Encoding": "gzip"}, "body: not valid gzip"),
            (
                gzip.compress(b"{}" * 99, mtime=0)[:-9],
                {"Content-Encoding": "gzip"},
                "body: the gzip data",
            ),
            (zlib.compress(b"{}" * 99)[:-5], {"Content-Encoding": "deflate"}, "body: the deflate"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_body(
        self, content: bytes, headers: dict[str, str], message: str, mnist: Bundle
    ) -> None:
        async def body(service: Service) -> None:
            response = await service.client.post(INFER, content=content, headers=headers)
            assert error(response, 400).startswith(message)

        using(mnist, body)

    def test_a_body_that_is_too_large(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            post, data = service.client.post, b" " * (MAX_BODY + 1)
            told = error(await post(INFER, content=data), 413)
            assert told == f"body: more than {MAX_BODY} bytes"
            packed, headers = gzip.compress(data), {"Content-Encoding": "gzip"}
            told = error(await post(INFER, content=packed, headers=headers), 413)
            assert told == f"body: more than {MAX_BODY} bytes when decompressed"

        using(mnist, body)

    @pytest.mark.parametrize("binary", [False, True])
    def test_bombs_do_not_stop_the_others(self, binary: bool, mnist: Bundle) -> None:
        bomb = gzip.compress(b'{"inputs": [' + b"[]," * 8_000_000 + b"0]}")
        headers = {"Content-Encoding": "gzip", **({HEADER_LENGTH: "24000015"} if binary else {})}
        largest = []  # of each round: the machine, too, may stand still

        async def body(service: Service) -> None:
            async def attack() -> None:
                post = service.client.post(INFER, content=bomb, headers=headers)
                assert error(await post, 413).startswith("body: more than")

            for _ in range(3):
                largest.append(await largest_gap(service, [attack() for _ in range(6)]))

        using(mnist, body, max_body=30_000_000)
        assert min(largest) < 0.1, largest

    def test_a_body_in_pieces_is_not_read_to_its_end(self, mnist: Bundle) -> None:
        read = 0

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal read
            for _ in range(1000):
                read += 1
                yield b"x" * 10_000

        async def body(service: Service) -> None:
            response = await service.client.post(INFER, content=pieces())
            assert "more than" in error(response, 413)
            assert read <= 12

        using(mnist, body)


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return what a server says of a request."""
    return {
        "type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(),
        "query_string": b"", "headers": list(headers), "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip


def test_a_client_that_goes_away_is_no_fault_of_ours(
    mnist: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(service: Service) -> None:
        transport = service.client._transport
        assert isinstance(transport, httpx.ASGITransport)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        await transport.app(scope((b"content-length", b"100")), receive, send)

    using(mnist, body)
    assert "internal error" not in caplog.text


class Leaving:
    """A client that sends a request, and goes away when it is told to."""

    def __init__(self, service: Service, images: np.ndarray) -> None:
        self.service = service
        self.body = json.dumps({"inputs": [tensor(images)]}).encode()
        self.away = asyncio.Event()
        self.sent: list[Any] = []
        self.watched = False
        self._asked = 0

    async def receive(self) -> dict[str, Any]:
        self._asked += 1
        if self._asked <= 2:  # a server may say again that the body is over
            body = self.body if self._asked == 1 else b""
            return {"type": "http.request", "body": body, "more_body": False}
        self.watched = True
        try:
            await self.away.wait()
        finally:
            self.watched = False
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def infer(self) -> None:
        transport = self.service.client._transport
        assert isinstance(transport, httpx.ASGITransport)
        await transport.app(scope(), self.receive, self.send)


class TestLeaving:
    def test_queries_that_nobody_waits_for_are_cancelled(
        self, mnist: Bundle, images: np.ndarray, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def body(service: Service) -> None:
            service.hang_all()
            client = Leaving(service, images[: 2 * K])
            request = asyncio.create_task(client.infer())
            while len(service.front.scheduler.queries) < 2 * K:
                await asyncio.sleep(0.005)
            client.away.set()
            await asyncio.wait_for(request, 30)
            assert client.sent[0]["status"] == 499
            state = (await service.client.get("/page/state")).json()
            assert state["answers"]["cancelled"] == 2 * K
            assert {m["outcome"] for g in state["groups"] for m in g["members"]} == {"cancelled"}
            assert not service.front.scheduler.queries

        using(mnist, body)
        assert "internal error" not in caplog.text

    def test_one_that_stays_is_answered(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            client = Leaving(service, images[:K])
            await asyncio.wait_for(client.infer(), 30)
            assert client.sent[0]["status"] == 200
            await asyncio.sleep(0)
            assert not client.watched
            assert service.front.metrics.queries.labels("cancelled")._value.get() == 0

        using(mnist, body)

    def test_a_server_that_cannot_tell_leaves_the_client_its_answer(
        self, mnist: Bundle, images: np.ndarray, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Deaf(Leaving):
            async def receive(self) -> dict[str, Any]:
                if self._asked == 2:
                    raise RuntimeError("unknown")
                return await super().receive()

        async def body(service: Service) -> None:
            client = Deaf(service, images[:K])
            await asyncio.wait_for(client.infer(), 30)
            assert client.sent[0]["status"] == 200

        using(mnist, body)
        assert "disconnects are not noticed" in caplog.text

    def test_what_is_large_is_not_parsed_for_who_has_left(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parsed: list[int] = []
        go_on = threading.Event()

        def slowly(*words: Any) -> Any:
            parsed.append(1)
            assert go_on.wait(30)
            return parse_request(*words)

        async def body(service: Service) -> None:
            monkeypatch.setattr(app, "parse_request", slowly)
            large = np.full_like(images[:1], 200).repeat(24, 0)
            first, second = Leaving(service, large), Leaving(service, large)
            requests = [asyncio.create_task(first.infer())]
            while not parsed:
                await asyncio.sleep(0.005)
            requests.append(asyncio.create_task(second.infer()))
            await asyncio.sleep(0.05)  # it waits for its turn
            second.away.set()
            await asyncio.sleep(0.05)
            go_on.set()
            await asyncio.wait_for(asyncio.gather(*requests), 30)
            assert [client.sent[0]["status"] for client in (first, second)] == [200, 499]
            assert len(parsed) == 1

        using(mnist, body)


class TestToken:
    OPEN = ("/v2/health/live", "/v2/health/ready", "/")
    CLOSED = (
        "/v2",
        "/v2/models/mnist",
        "/metrics",
        "/page/state",
        "/demo/requests",
        "/times",
        "/nowhere",
    )

    def test_who_is_let_in(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            client = service.client
            for path in self.OPEN:
                assert (await client.get(path)).status_code == 200
            wrong = ("", TOKEN, f"Bearer {TOKEN}x", "Bearer ", f"bearer{TOKEN}", "Bearer \xe9")
            for given in wrong:
                headers = {b"Authorization": given.encode("latin-1")}
                for path in self.CLOSED:
                    response = await client.get(path, headers=headers)
                    assert "a bearer token is needed" in error(response, 401)
                    assert response.headers["www-authenticate"] == "Bearer"
            error(await service.infer(images[:1]), 401)
            count = service.front.metrics.registry.get_sample_value
            assert count("codedinvnet_requests_total", {"code": "401"}) == 1
            error(await client.post("/demo/workers/0/kill"), 401)
            client.headers["Authorization"] = f"Bearer {TOKEN}"
            for path in self.CLOSED[:-1]:
                assert (await client.get(path)).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200
            client.headers["Authorization"] = f"bearer {TOKEN}"  # of any case, says HTTP
            assert (await service.infer(images[:1])).status_code == 200

        using(mnist, body, token=TOKEN, demo=images)


class TestHost:
    """After DNS rebinding a page of another site is one of ours, but for its name."""

    @pytest.mark.parametrize(
        ("hosts", "known", "others"),
        [
            (
                (),
                ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"],
                ["evil.test", "localhost.evil.test", "10.0.0.5", "", "[::2]:8000", "*", "x" * 999],
            ),
            (
                ("0.0.0.0", "Our.example"),
                ["10.0.0.5:8000", "[fe80::1]:8000", "our.example", "our.example:8000"],
                ["evil.test", "10.0.0.5.evil.test", "our.example.evil.test", "2130706433.evil"],
            ),
            (("192.168.1.7",), ["192.168.1.7:8000", "localhost"], ["192.168.1.8"]),
            (("*",), ["evil.test", "10.0.0.5"], []),
        ],
        ids=["loopback", "any address", "one address", "any"],
    )
    def test_names(
        self, hosts: tuple[str, ...], known: list[str], others: list[str], mnist: Bundle
    ) -> None:
        async def body(service: Service) -> None:
            async def status(name: str) -> int:
                return (await service.client.get("/page/state", headers={"Host": name})).status_code

            assert [await status(name) for name in known] == [200] * len(known)
            assert [await status(name) for name in others] == [421] * len(others)

        using(mnist, body, hosts=hosts)

    def test_all_requests(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            client = service.client
            client.headers["Host"] = "evil.test"
            error(await service.infer(images[:1]), 421)
            for path in ("/", "/metrics", "/v2/health/live", "/demo/requests"):
                error(await client.get(path), 421)
            assert "known" in error(await client.post("/demo/workers/0/kill"), 421)

        using(mnist, body, demo=images, token=TOKEN)

    def test_no_redirect_and_no_frame(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            error(await service.client.get("/metrics/"), 404)
            page = await service.client.get("/")
            assert page.headers["X-Frame-Options"] == "DENY"
            assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"

        using(mnist, body)

    def test_who_says_no_name_is_no_browser(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            transport, sent = service.client._transport, []
            assert isinstance(transport, httpx.ASGITransport)

            async def receive() -> dict[str, Any]:
                return {"type": "http.request"}

            async def send(message: Any) -> None:
                sent.append(message)

            for headers, status in (([], 404), ([b"localhost", b"evil.test"], 421)):
                asked = scope(*((b"host", name) for name in headers))
                await transport.app({**asked, "path": "/nowhere"}, receive, send)
                assert sent[0]["status"] == status
                sent.clear()

        using(mnist, body)


class TestNotFound:
    @pytest.mark.parametrize(
        "path",
        [
            "/v2/models/MNIST",
            "/v2/models/mnist/versions/2",
            "/v2/models/mnist/versions/2/ready",
            "/v2/models/fashion/ready",
            "/nowhere",
            "/v2/nowhere",
            "/docs",
            "/openapi.json",
            "/demo/requests",
        ],
    )
    def test_get(self, path: str, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            assert error(await service.client.get(path), 404)

        using(mnist, body)

    def test_infer(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            post = service.client.post
            message = error(await post("/v2/models/Fashion/infer", json={}), 404)
            assert message == "no model 'Fashion' version '1'; there is 'mnist' 1"
            error(await post("/v2/models/mnist/versions/2/infer", json={}), 404)
            error(await post("/demo/workers/0/kill"), 404)

        using(mnist, body)

    def test_wrong_method(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            response = await service.client.get(INFER)
            error(response, 405)
            assert response.headers["allow"] == "POST"
            error(await service.client.post("/metrics"), 405)

        using(mnist, body)


class TestFailures:
    def test_overloaded(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            while len(service.front.scheduler.queries) < 8:
                await asyncio.sleep(0.005)
            response = await asyncio.wait_for(service.infer(images[:1]), 10)
            assert "overloaded" in error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            service.kill_all()
            assert (await first).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200

        using(mnist, body, max_pending=8)

    def test_what_is_large_is_not_parsed_for_nothing(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def body(service: Service) -> None:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            while len(service.front.scheduler.queries) < 8:
                await asyncio.sleep(0.005)
            monkeypatch.setattr(app, "parse_request", None)
            assert "overloaded" in error(
                await service.infer(np.full_like(images[:1], 200).repeat(24, 0)), 503
            )
            monkeypatch.undo()
            service.kill_all()
            assert (await first).status_code == 200

        using(mnist, body, max_pending=8)

    def test_bodies_that_wait_to_be_parsed_have_a_limit_and_a_deadline(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parsed: list[object] = []
        large = np.full_like(images[:1], 200).repeat(24, 0)

        async def body(service: Service) -> None:
            def slowly(*words: Any) -> Any:
                parsed.append(words)
                time.sleep(0.2)
                return parse_request(*words)

            monkeypatch.setattr(app, "parse_request", slowly)
            monkeypatch.setattr(service.front.admission, "takes", lambda *_: True)
            found = await asyncio.gather(*(service.infer(large) for _ in range(20)))
            statuses = [response.status_code for response in found]
            length = len(json.dumps({"inputs": [tensor(large)]}, separators=(",", ":")))
            assert statuses.count(503) == 20 - 8 * MAX_BODY // length
            late = [response for response in found if response.status_code == 504]
            told = {error(response, 504) for response in late}  # the last one when it was parsed
            assert "deadline passed" in told
            assert all(words.endswith("deadline passed") for words in told)
            assert set(statuses) == {200, 503, 504}
            # All that waited would take two seconds: the last ones are late before their turn.
            assert len(parsed) < len(statuses) - statuses.count(503)
            assert service.front.metrics.queries.labels("deadline")._value.get() >= len(late)

        using(mnist, body, deadline=0.9, max_pending=1000)

    def test_who_finds_no_room_need_not_send_the_body(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        class Unread(Leaving):
            async def receive(self) -> dict[str, Any]:
                raise AssertionError("its body was read")

        async def body(service: Service) -> None:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            while len(service.front.scheduler.queries) < 8:
                await asyncio.sleep(0.005)
            client = Unread(service, images[:1])
            await asyncio.wait_for(client.infer(), 30)
            assert client.sent[0]["status"] == 503
            service.kill_all()
            assert (await first).status_code == 200

        using(mnist, body, max_pending=8)

    def test_bodies_that_arrive_have_a_limit(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Halting(Leaving):
            """Sends all but the end of a body, and then waits."""

            def __init__(
                self, service: Service, images: np.ndarray, length: int = MAX_BODY
            ) -> None:
                super().__init__(service, images)
                self.length = length

            async def receive(self) -> dict[str, Any]:
                self._asked += 1
                if self._asked > 1:
                    await self.away.wait()
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": bytes(self.length), "more_body": True}

        async def body(service: Service) -> None:
            halting = [Halting(service, images[:1]) for _ in range(8)]
            requests = [asyncio.create_task(client.infer()) for client in halting]
            await asyncio.sleep(0.05)
            one_more = Halting(service, images[:1])
            await asyncio.wait_for(one_more.infer(), 30)
            assert one_more.sent[0]["status"] == 503
            small = Halting(service, images[:1], 100)
            await asyncio.wait_for(small.infer(), 30)
            assert small.sent[0]["status"] == 503
            for client in halting:
                client.away.set()
            await asyncio.wait_for(asyncio.gather(*requests), 30)
            assert {client.sent[0]["status"] for client in halting} == {499}
            again = Halting(service, images[:1])
            again.away.set()
            await asyncio.wait_for(again.infer(), 30)
            assert again.sent[0]["status"] == 499
            count = service.front.metrics.registry.get_sample_value
            assert count("codedinvnet_requests_total", {"code": "503"}) == 2
            assert count("codedinvnet_requests_total", {"code": "499"}) == len(halting) + 1

        using(mnist, body)

    def test_images_that_wait_are_counted_with_bodies(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        large = np.full_like(images[:1], 200).repeat(24, 0)  # a body of 75 KB

        async def body(service: Service) -> None:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:12]))
            while len(service.front.scheduler.queries) < 12:
                await asyncio.sleep(0.005)
            assert "overloaded" in error(await service.infer(large), 503)
            service.kill_all()
            assert (await first).status_code == 200
            assert (await service.infer(large)).status_code == 200

        using(mnist, body, body_memory=80_000)

    def test_a_body_that_does_not_come(self, mnist: Bundle, images: np.ndarray) -> None:
        class Silent(Leaving):
            async def receive(self) -> dict[str, Any]:
                if self._asked:
                    await self.away.wait()
                self._asked += 1
                return {"type": "http.request", "body": self.body[:100], "more_body": True}

        async def body(service: Service) -> None:
            client = Silent(service, images[:1])
            began = time.monotonic()
            await asyncio.wait_for(client.infer(), 30)
            assert 0.2 <= time.monotonic() - began < 2
            start, content = client.sent[0], client.sent[1]["body"]
            assert start["status"] == 408
            assert (b"connection", b"close") in start["headers"]
            assert json.loads(content) == {"error": "body: not here after 0.2 s"}

        using(mnist, body, deadline=0.2)

    @pytest.mark.parametrize("depth", [32, 33, 900, 970, 1000, 5000])
    def test_deep_parameters(self, depth: int, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            deep = "[" * (depth - 1) + "7" + "]" * (depth - 1)
            inputs = json.dumps([tensor(images[:1])])
            given = f'{{"inputs": {inputs}, "parameters": {{"x": {deep}}}}}'
            content, headers = gzip.compress(given.encode()), {"Content-Encoding": "gzip"}
            response = await service.client.post(INFER, content=content, headers=headers)
            if depth <= 32:
                assert response.status_code == 200
            else:
                assert error(response, 400).startswith(("parameters: nested", "body: not valid"))

        using(mnist, body)

    def test_the_deadline_counts_from_the_requests_arrival(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def body(service: Service) -> None:
            def slowly(*words: Any) -> Any:
                time.sleep(0.8)
                return parse_request(*words)

            monkeypatch.setattr(app, "parse_request", slowly)
            service.hang_all()
            late = service.infer(
                np.full_like(images[:1], 200).repeat(24, 0), parameters={"timeout": 900_000}
            )
            began = time.monotonic()
            assert "deadline passed" in error(await late, 504)
            assert 0.9 <= time.monotonic() - began < 1.7

        using(mnist, body)

    def test_our_own_mistake(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def body(service: Service) -> None:
            async def broken(*_: Any, **__: Any) -> None:
                raise ZeroDivisionError("a detail that is not for clients")

            monkeypatch.setattr(service.front, "infer", broken)
            assert (
                error(await service.infer(images[:1]), 500) == "internal error: ZeroDivisionError"
            )
            count = service.front.metrics.registry.get_sample_value
            assert count("codedinvnet_requests_total", {"code": "500"}) == 1

        using(mnist, body)

    def test_draining(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            await service.front.drain()
            response = await service.infer(images[:1])
            assert "shutting down" in error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            ready = await service.client.get("/v2/health/ready")
            assert (ready.status_code, ready.json()) == (503, {"ready": False})
            assert (await service.client.get("/v2/health/live")).status_code == 200

        using(mnist, body)

    def test_deadline(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.hang_all()
            message = error(await service.infer(images[:3], parameters={"timeout": 200_000}), 504)
            assert message == "3 of 3 queries: deadline passed"

        using(mnist, body)

    def test_deadline_of_the_service(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.hang_all()
            error(await service.infer(images[:1], parameters={"timeout": 50_000_000}), 504)

        using(mnist, body, deadline=0.2)

    def test_workers_that_fail(
        self, mnist: Bundle, images: np.ndarray, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def body(service: Service) -> None:
            service.pool.broken = set(range(WORKERS))
            message = error(await service.infer(images[:2], id="seven" * 100), 500)
            told = [vars(r)["fields"] for r in caplog.records if r.message == "query failed"]
            assert [fields["id"] for fields in told] == ["seven" * 20]
            assert message.startswith("2 of 2 queries failed: ")
            assert "this worker is broken" in message
            service.pool.broken = set()
            assert (await service.infer(images[:2])).status_code == 200

        using(mnist, body)


class TestViews:
    def test_health(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            get = service.client.get
            assert (await get("/v2/health/live")).json() == {"live": True}
            assert (await get("/v2/health/ready")).json() == {"ready": True}
            for path in ("/v2/models/mnist/ready", "/v2/models/mnist/versions/1/ready"):
                response = await get(path)
                assert response.status_code == 200
                assert response.json() == {"name": "mnist", "ready": True}
            for worker in range(WORKERS):
                service.front.scheduler.worker_lost(0.0, worker, "gone")
            assert (await get("/v2/health/ready")).status_code == 503

        using(mnist, body)

    def test_without_workers_it_is_dead_after_a_time(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        class Lost(BundlePool):
            async def replace(self, worker: int) -> None:
                raise WorkerDied("no node is left")

        async def body(service: Service) -> None:
            get = service.client.get
            for worker in range(WORKERS):
                service.pool.kill(worker)
            while service.front.ready:
                await asyncio.sleep(0.01)
            assert error(await service.infer(images[:1]), 503).endswith("try again later")
            assert (await get("/v2/health/live")).status_code == 200
            service.front.supervisor.down_timeout = 0.0
            response = await get("/v2/health/live")
            assert response.status_code == 503
            assert response.json() == {"live": False}

        using(mnist, body, pool_class=Lost)

    def test_while_it_starts(self, mnist: Bundle, images: np.ndarray) -> None:
        go = asyncio.Event()

        class Slow(BundlePool):
            async def start(self, size: int) -> None:
                await go.wait()
                await super().start(size)

            def pid(self, worker: int) -> int | None:
                assert go.is_set(), "there is no process yet"
                return None

        async def body(service: Service) -> None:
            get = service.client.get
            try:
                assert (await get("/v2/health/live")).status_code == 200
                for path in ("/v2/health/ready", "/v2/models/mnist/ready"):
                    assert (await get(path)).status_code == 503
                response = await service.infer(images[:1])
                assert error(response, 503) == "starting: try again later"
                assert int(response.headers["retry-after"]) >= 1
                workers = (await get("/page/state")).json()["workers"]
                assert [worker["state"] for worker in workers] == ["starting"] * WORKERS
                metrics = (await get("/metrics")).text
                assert f'codedinvnet_workers{{state="starting"}} {WORKERS:.1f}' in metrics
                deed = await service.client.post("/demo/workers/0/kill")
                assert error(deed, 503) == "worker 0 is starting"
            finally:
                go.set()
            await service.started
            assert (await get("/v2/health/ready")).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200
            workers = (await get("/page/state")).json()["workers"]
            assert {worker["state"] for worker in workers} == {"up"}

        using(mnist, body, demo=images[:1], pool_class=Slow, wait=False)

    def test_metadata(self, mnist: Bundle) -> None:
        async def body(service: Service) -> None:
            reply = (await service.client.get("/v2")).json()
            assert reply["name"] == "codedinvnet"
            assert reply["extensions"] == ["binary_tensor_data"]
            assert re.fullmatch(r"\d+\.\d+\.\d+.*", reply["version"])
            model = (await service.client.get("/v2/models/mnist")).json()
            assert model == (await service.client.get("/v2/models/mnist/versions/1")).json()
            assert model["name"] == "mnist"
            assert model["versions"] == ["1"]
            assert model["inputs"][0]["shape"] == [-1, 1, 28, 28]
            names = [output["name"] for output in model["outputs"]]
            assert names == ["probabilities", "label", "outcome"]

        using(mnist, body)

    def test_metrics(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.pool.hang(2)
            await service.infer(images[:K])
            response = await service.client.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            lines = response.text.splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            assert values['codedinvnet_queries_total{outcome="direct"}'] == "3.0"
            assert values['codedinvnet_queries_total{outcome="decoded"}'] == "1.0"
            assert values['codedinvnet_workers{state="up"}'] == str(float(WORKERS))
            assert values["codedinvnet_pending_queries"] == "0.0"
            assert values['codedinvnet_requests_total{code="200"}'] == "1.0"
            assert values[f'codedinvnet_task_failures_total{{worker="{WORKERS - 1}"}}'] == "0.0"
            assert values[f'codedinvnet_groups_total{{size="{K - 1}"}}'] == "0.0"
            assert all(name.startswith(("codedinvnet_", "process_")) for name in values)
            described = {line.split()[2] for line in lines if line.startswith("# HELP")}
            assert described >= {
                "codedinvnet_queries_total",
                "codedinvnet_query_latency_seconds",
                "codedinvnet_decode_seconds",
                "codedinvnet_worker_seconds",
                "codedinvnet_queue_depth",
                "codedinvnet_worker_restarts_total",
                "codedinvnet_groups_total",
                "codedinvnet_live_recovered_agreement",
                "codedinvnet_parity_residual",
                "codedinvnet_event_loop_lag_seconds",
            }

        using(mnist, body)

    def test_page(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            response = await service.client.get("/")
            assert response.headers["content-type"].startswith("text/html")
            assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text) == []
            assert re.findall(r"\b(?:src|href)=\"(?!data:)", response.text) == []

            service.pool.hang(2)
            await service.infer(images[:K])
            state = (await service.client.get("/page/state")).json()
            assert state["answers"]["direct"] == 3
            assert state["answers"]["decoded"] == 1
            assert state["demo"] is False
            assert state["k"] == K
            assert len(state["workers"]) == WORKERS
            assert {worker["pid"] for worker in state["workers"]} == {None}
            (group,) = state["groups"]
            outcomes = [member["outcome"] for member in group["members"]]
            assert outcomes == ["direct", "direct", "decoded", "direct"]
            assert base64.b64decode(group["members"][0]["image"]) == images[0].tobytes()
            assert set(state["percentiles"]) == {"direct", "decoded"}
            await asyncio.sleep(0.4)
            state = (await service.client.get("/page/state")).json()
            assert [w["state"] for w in state["workers"]].index("silent") == 2

        using(mnist, body)

    def test_the_page_shows_float_images(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            floats = (images[:K] / 255).astype(np.float32)
            inputs = [tensor(floats, datatype="FP32")]
            await service.client.post(INFER, json={"inputs": inputs})
            (group,) = (await service.client.get("/page/state")).json()["groups"]
            assert base64.b64decode(group["members"][1]["image"]) == images[1].tobytes()

        using(mnist, body)


class Numbered(BundlePool):
    """Claims that its workers are processes."""

    def pid(self, worker: int) -> int | None:
        return 1_000_000_000 + worker


class TestDemo:
    def test_images(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            found = (await service.client.get("/demo/requests")).json()
            data = [request["inputs"][0]["data"] for request in found]
            assert [base64.b64decode(text) for text in data] == [i.tobytes() for i in images]
            assert (await service.client.get("/page/state")).json()["demo"] is True

        using(mnist, body, demo=images)

    def test_deeds(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signals: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))

        async def body(service: Service) -> None:
            post = service.client.post
            for deed in ("kill", "stop", "heal"):
                response = await post(f"/demo/workers/2/{deed}")
                assert response.json() == {"worker": 2, "deed": deed}
            sent = [signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT]
            assert signals == [(1_000_000_002, number) for number in sent]
            for worker in (WORKERS, -1, "one"):
                message = error(await post(f"/demo/workers/{worker}/kill"), 404)
                assert message == f"no worker {worker}"
            assert "no deed 'hurt'" in error(await post("/demo/workers/0/hurt"), 404)
            assert len(signals) == 3

            await post("/demo/workers/1/slow")
            response = await service.infer(images[:K])
            assert response.json()["outputs"][2]["data"][1] == "decoded"
            await post("/demo/workers/1/heal")
            pool = service.front.pool
            assert isinstance(pool, FaultyPool)
            assert pool.faults == []

        using(mnist, body, demo=images, pool_class=Numbered)

    def test_a_page_of_another_site_hurts_nobody(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a browser sends there without asking first has no header of ours."""
        signals: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))

        async def body(service: Service) -> None:
            for given in (None, "", "0"):
                service.client.headers.pop(DEMO_HEADER, None)
                if given is not None:
                    service.client.headers[DEMO_HEADER] = given
                message = error(await service.client.post("/demo/workers/0/kill"), 403)
                assert message == f"the header {DEMO_HEADER}: 1 is needed"
            assert not signals
            page = (await service.client.get("/")).text
            assert f'headers: {{ "{DEMO_HEADER}": "1" }}' in page

        using(mnist, body, demo=images, pool_class=Numbered)

    def test_a_worker_of_another_machine(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            post = service.client.post
            for deed in ("kill", "stop"):
                message = error(await post(f"/demo/workers/2/{deed}"), 409)
                assert message == "worker 2 runs on another machine: slow it instead"
            for deed in ("slow", "heal"):
                assert (await post(f"/demo/workers/2/{deed}")).status_code == 200

        using(mnist, body, demo=images)

    def test_a_worker_that_is_being_replaced(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:
            service.front.workers[2].state = "down"
            message = error(await service.client.post("/demo/workers/2/kill"), 409)
            assert message == "worker 2 is being replaced"

        using(mnist, body, demo=images)

    def test_a_worker_that_is_gone(self, mnist: Bundle, images: np.ndarray) -> None:
        async def body(service: Service) -> None:  # before its death is noticed
            response = await service.client.post("/demo/workers/1/kill")
            assert response.status_code == 200

        using(mnist, body, demo=images, pool_class=Numbered)
