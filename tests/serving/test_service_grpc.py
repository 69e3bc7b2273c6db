"""A served model over gRPC: the same answers as the model's own, and the same refusals."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
import tritonclient.http.aio as triton_http
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from codedinvnet.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.processes import free_port
from codedinvnet.serving import serve, service_grpc
from codedinvnet.serving.faces import v2_grpc
from codedinvnet.serving.faces.grpc_stubs import SERVICE
from codedinvnet.serving.faces.v2 import parse_request, render_response
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.run import running as gateway
from codedinvnet.serving.options import ServeOptions, check
from codedinvnet.serving.serve import running
from tests.models.factories import PLACE, TOKENS
from tests.observing import until
from tests.serving.faces.requests import share_memory
from tests.serving.gateway.fakes import Fake
from tests.serving.gateway.fakes import gateway as gateway_of

SOURCE = f"{PLACE}:mlp"
ROWS = np.random.default_rng(3).random((3, 16), np.float32)


@asynccontextmanager
async def asking(
    source: str = SOURCE, **options: Any
) -> AsyncIterator[tuple[triton.InferenceServerClient, str, str]]:
    """Serve the model in this process; yield a client, and both addresses."""
    port = free_port()
    settings = {"pool": "examples/my_pool.py:Pool", "workers": 2, "port": 0, **options}
    address = f"127.0.0.1:{port}"
    async with (
        running(ServeOptions(source, grpc_port=port, **settings)) as (url, _),
        triton.InferenceServerClient(address) as client,
    ):
        yield client, address, url


def tensor(rows: np.ndarray = ROWS, name: str = "input") -> Any:
    found = triton.InferInput(name, list(rows.shape), "FP32")
    found.set_data_from_numpy(rows)
    return found


async def test_the_answers_are_the_models() -> None:
    model = open_model(SOURCE)
    output = model.signature.outputs[0].name

    async with asking() as (client, address, _):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("mlp")
        metadata = await client.get_model_metadata("mlp")
        assert [list(t.shape) for t in metadata.inputs] == [[-1, 16]]
        answer = await client.infer("mlp", [tensor()], request_id="7")
        found = answer.as_numpy(output)
        for i in range(len(ROWS)):
            own = model.run({"input": ROWS[i : i + 1]})[output]
            assert found[i : i + 1].tobytes() == own.tobytes()
        assert set(answer.as_numpy("outcome")) == {b"direct"}
        assert answer.get_response().id == "7"
        wanted = [triton.InferRequestedOutput("outcome")]
        answer = await client.infer("mlp", [tensor()], outputs=wanted)
        assert answer.as_numpy(output) is None

        typed = pb.ModelInferRequest(model_name="mlp")
        entry = typed.inputs.add(name="input", datatype="FP32", shape=ROWS.shape)
        entry.contents.fp32_contents.extend(ROWS.ravel().tolist())
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            body = await call(typed.SerializeToString())
        response = pb.ModelInferResponse.FromString(body)
        assert response.raw_output_contents[0] == found.tobytes()


async def test_what_is_no_message_is_the_clients_mistake_and_requests_are_counted() -> None:
    async with asking() as (client, address, http):
        await client.infer("mlp", [tensor()])
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            await client.infer("other", [tensor()])
        async with grpc.aio.insecure_channel(address) as channel:
            for method in ("ModelInfer", "ModelMetadata", "ModelReady"):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary(f"/{SERVICE}/{method}")(b"\x0a\x05m")
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        async with aiohttp.ClientSession() as session, session.get(f"{http}/metrics") as reply:
            text = await reply.text()
        for code in (200, 400, 404):
            assert f'codedinvnet_requests_total{{code="{code}"}} 1.0' in text


async def test_a_client_that_leaves_is_counted_as_one() -> None:
    fake = Fake()

    async with gateway_of(fake, grpc_port=0) as (http, _, port):
        fake.hold()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            request = pb.ModelInferRequest(model_name="m").SerializeToString()
            asked = call(request)
            await until(lambda: bool(fake.seen))
            asked.cancel()

        async def counted() -> bool:
            async with aiohttp.ClientSession() as session, session.get(f"{http}/metrics") as reply:
                return 'codedinvnet_requests_total{code="499"} 1.0' in await reply.text()

        while not await counted():
            await asyncio.sleep(0.01)
        fake.go()


async def test_behind_the_gateway_the_answers_are_the_same() -> None:
    """The service over both of its faces, as two upstreams, behind both faces of the gateway."""

    async with asking() as (client, address, http):
        wanted = await client.infer("mlp", [tensor()])
        names = [output.name for output in wanted.get_response().outputs]
        upstreams = (http, f"grpc://{address}")
        settings = GatewayOptions("mlp", upstream=upstreams, port=0, grpc_port=0, slots=1)
        async with gateway(settings) as (url, relay, port):
            over_http = triton_http.InferenceServerClient(url.removeprefix("http://"))
            over_grpc = triton.InferenceServerClient(f"127.0.0.1:{port}")
            async with over_http, over_grpc:
                rows = triton_http.InferInput("input", list(ROWS.shape), "FP32")
                rows.set_data_from_numpy(ROWS)
                for asked, sent in ((over_http, rows), (over_grpc, tensor())):
                    for _ in range(2):
                        found = await asked.infer("mlp", [sent])
                        for name in names:
                            assert (found.as_numpy(name) == wanted.as_numpy(name)).all()
            calls = relay.front.metrics.registry.get_sample_value
            for upstream in upstreams:
                labels = {"upstream": upstream, "result": "ok"}
                assert calls("codedinvnet_upstream_calls_total", labels) == 2


@pytest.mark.parametrize(
    ("model", "rows", "name", "status", "told"),
    [
        ("other", ROWS, "input", "NOT_FOUND", "mlp"),
        ("mlp", ROWS[:, :5], "input", "INVALID_ARGUMENT", "shape"),
        ("mlp", ROWS, "z", "INVALID_ARGUMENT", "input"),
        ("mlp", np.repeat(ROWS, 20, 0), "input", "INVALID_ARGUMENT", "at most"),
    ],
)
async def test_refusals(model: str, rows: np.ndarray, name: str, status: str, told: str) -> None:
    async with asking(max_batch=50) as (client, _, _):
        with pytest.raises(InferenceServerException) as error:
            await client.infer(model, [tensor(rows, name)])
        assert error.value.status() == f"StatusCode.{status}"
        assert told in error.value.message()


async def test_the_token_is_needed(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")

    async with asking(token_file=token) as (client, _, _):
        assert await client.is_model_ready("mlp")
        with pytest.raises(InferenceServerException) as error:
            await client.infer("mlp", [tensor()])
        assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        headers = {"authorization": "Bearer secret"}
        await client.infer("mlp", [tensor()], headers=headers)


async def test_http_and_grpc_share_the_memory_for_requests() -> None:
    message = pb.ModelInferRequest(model_name="mlp", raw_input_contents=[ROWS.tobytes()])
    message.inputs.add(name="input", datatype="FP32", shape=ROWS.shape)
    async with asking(deadline_ms=60_000, max_body_memory=1 / 16) as (_, address, url):
        await share_memory(url, int(address.split(":")[1]), message)


async def test_typed_contents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2_grpc, "MOST_JSON", ROWS.size - 1)
    message = pb.ModelInferRequest(model_name="mlp")
    entry = message.inputs.add(name="input", datatype="FP32", shape=ROWS.shape)
    entry.contents.fp32_contents.extend(ROWS.ravel().tolist())
    async with asking() as (client, address, _), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/{SERVICE}/ModelInfer")(message.SerializeToString())
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "send raw contents" in (refused.value.details() or "")
        await client.infer("mlp", [tensor()])


async def test_what_a_request_becomes_counts() -> None:
    """Small whole numbers take a byte each on the way, and four as a tensor."""

    def message(rows: int) -> bytes:
        made = pb.ModelInferRequest(model_name="words")
        entry = made.inputs.add(name="tokens", datatype="INT32", shape=[rows, TOKENS])
        entry.contents.int_contents.extend([1] * rows * TOKENS)
        serialized: bytes = made.SerializeToString()
        return serialized

    assert len(message(12)) < 2**16 < 4 * 12 * TOKENS
    async with (
        asking(f"{PLACE}:words", max_body_memory=1 / 16) as (_, address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        await ask(message(3))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(message(12))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        await ask(message(3))


async def test_others_are_served_while_a_large_answer_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_at_it, let_go = threading.Event(), threading.Event()

    def slowly(*words: Any) -> Any:
        is_at_it.set()
        assert let_go.wait(20)
        return render_response(*words)

    monkeypatch.setattr(service_grpc, "render_response", slowly)
    monkeypatch.setattr(service_grpc, "LARGE_ANSWER", 1)
    async with asking() as (client, *_):
        asked = asyncio.create_task(client.infer("mlp", [tensor()]))
        assert await asyncio.to_thread(is_at_it.wait, 20)
        assert await client.is_server_live()
        let_go.set()
        await asked


async def test_large_requests_take_turns_and_are_not_read_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadline, came, read = 0.2, threading.Semaphore(0), 0

    class Counting(FrontEnd):
        def check_room(self, queries: int, seconds: float | None = None) -> None:
            super().check_room(queries, seconds)
            came.release()

    def slowly(*words: Any) -> Any:
        nonlocal read
        read += 1
        for _ in range(3):  # each of the two when it came, and one when its turn had come
            assert came.acquire(timeout=20)
        time.sleep(2 * deadline)
        return parse_request(*words)

    monkeypatch.setattr(serve, "FrontEnd", Counting)
    monkeypatch.setattr(service_grpc, "parse_request", slowly)
    monkeypatch.setattr(service_grpc, "LARGE_BODY", 1)
    async with asking(deadline_ms=1000 * deadline) as (client, *_):
        asked = [client.infer("mlp", [tensor()]) for _ in range(2)]
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, InferenceServerException)
            assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert read == 1


async def test_a_port_that_is_taken() -> None:
    async with asking() as (_, address, _):
        port = int(address.rpartition(":")[2])
        with pytest.raises(UserError, match=r"--grpc-port: cannot listen on 127\.0\.0\.1"):
            async with running(ServeOptions(SOURCE, port=0, grpc_port=port)):
                pass
    with pytest.raises(UserError, match=r"--grpc-port: must lie in 0\.\.65535"):
        check(ServeOptions(SOURCE, grpc_port=-1))
