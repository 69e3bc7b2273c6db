"""The gateway before upstreams of this process: what is passed on."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import aiohttp
import grpc
import pytest
import tritonclient.grpc.aio as triton
from aiohttp import web
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException
from yarl import URL

from codedinvnet.serving.answers import DeadlinePassed
from codedinvnet.serving.faces.grpc_stubs import SERVICE
from codedinvnet.serving.gateway import versions
from codedinvnet.serving.gateway.calls import Call
from codedinvnet.serving.gateway.upstream_metrics import ERROR, FAILED
from codedinvnet.serving.gateway.upstreams import open_upstream
from tests.observing import counted, until
from tests.serving.gateway.asking import BODY, ask, ask_grpc, request
from tests.serving.gateway.fakes import ANSWER, Fake, GrpcFake, gateway


async def test_over_http_all_is_passed_on_as_it_came() -> None:
    fake = Fake()
    fake.headers["X-Theirs"] = "ä"
    fake.body = b"\x1f\x8bpacked"
    fake.headers["Content-Encoding"] = "gzip"

    async with gateway(fake) as (address, _, _):
        packed = b"\x1f\x8bnot looked into"
        reply = await ask(
            address,
            packed,
            "/v2/models/m/versions/3/infer",
            content_encoding="gzip",
            traceparent="00-1",
            x_ours="ü",
            inference_header_content_length="17",
            authorization="Bearer theirs",
        )
        path, headers, body = fake.seen[0]
        assert (path, body) == ("/v2/models/m/versions/3/infer", packed)
        assert headers["content-encoding"] == "gzip"
        assert headers["traceparent"] == "00-1"
        assert headers["x-ours"] == "ü"
        assert headers["inference-header-content-length"] == "17"
        assert headers["authorization"] == "Bearer theirs"
        assert headers["host"] == f"127.0.0.1:{fake.port}"
        assert reply.body == fake.body
        assert reply.headers["x-theirs"] == "ä"
        assert reply.headers["codedinvnet-outcome"] == "direct"


@pytest.mark.parametrize("kind", [Fake, GrpcFake])
async def test_so_is_the_query_of_its_url(kind: type[Fake | GrpcFake]) -> None:
    """A proxy before an upstream may want a key there; over gRPC there is no such thing."""
    found: list[str] = []

    class Asked(Fake):
        async def _infer(self, request: web.Request) -> web.Response:
            found.append(request.rel_url.raw_query_string)
            return await super()._infer(request)

    async with gateway(Asked() if kind is Fake else kind()) as (address, _, _):
        for query in ("?key=a%20b&x=%2f", ""):
            url = URL(f"{address}/v2/models/m/infer{query}", encoded=True)
            async with aiohttp.ClientSession() as session, session.post(url, data=BODY) as reply:
                assert reply.status == 200
    assert found == (["key=a%20b&x=%2f", ""] if kind is Fake else [])


async def test_a_version_that_no_upstream_has_is_not_ready() -> None:
    """Over both faces."""
    fake = Fake()

    async with (
        gateway(fake, grpc_port=0) as (address, _, port),
        aiohttp.ClientSession(address) as session,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        path = "/v2/models/m/versions/"
        async with session.get(f"{path}99/ready") as reply:
            assert (reply.status, (await reply.json())["ready"]) == (200, True)
        assert await client.is_model_ready("m", "99")
        fake.metadata = None
        async with session.get(f"{path}98/ready") as reply:
            assert (reply.status, list(await reply.json())) == (404, ["error"])
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            await client.is_model_ready("m", "98")
        async with session.get("/v2/models/m/ready") as reply:
            assert (reply.status, (await reply.json())["ready"]) == (200, True)


@pytest.mark.parametrize("version", [".", "..", "../../other", "a\\b", "9" * 257])
async def test_what_is_no_version_is_asked_of_no_upstream(version: str) -> None:
    """A proxy before an upstream may resolve a path that leads elsewhere."""
    fake = Counting()
    over_http = quote(version, safe="").replace(".", "%2e")

    async with (
        gateway(fake, grpc_port=0) as (address, _, port),
        aiohttp.ClientSession() as session,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        message = pb.ModelInferRequest(model_name="m", model_version=version)
        for asked in (
            client.is_model_ready("m", version),
            client.get_model_metadata("m", version),
            ask_grpc(port, message.SerializeToString()),
        ):
            with pytest.raises((InferenceServerException, grpc.aio.AioRpcError)) as refused:
                await asked
            assert "INVALID_ARGUMENT" in str(refused.value)
            assert len(str(refused.value)) < 1000
        path = f"{address}/v2/models/m/versions/{over_http}"
        for method, rest in (("GET", "/ready"), ("GET", ""), ("POST", "/infer")):
            url = URL(path + rest, encoded=True)
            async with session.request(method, url, data=BODY) as reply:
                assert reply.status == (404 if "/" in version else 400)  # that is another path
        assert (fake.asked, fake.seen) == ([], [])
        for name in ("n" * 5000, "n" * 50_000):
            with pytest.raises(InferenceServerException, match="NOT_FOUND") as unknown:
                await client.is_model_ready(name)
            assert len(str(unknown.value)) < 1000


class Counting(Fake):
    """Tells which versions it was asked for, and answers no sooner than it may."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    async def _metadata(self, request: web.Request) -> web.Response:
        if "v" in request.match_info:
            self.asked.append(request.match_info["v"])
            await self.held.wait()
        return await super()._metadata(request)


async def test_an_upstream_is_asked_for_a_version_once_for_all_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs a token to ask whether one is ready."""
    fake, token = Counting(), tmp_path / "token"
    token.write_text("secret")

    async with (
        gateway(fake, grpc_port=0, token_file=token) as (address, _, port),
        aiohttp.ClientSession(address) as session,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):

        async def status() -> int:
            async with session.get("/v2/models/m/versions/99/ready") as reply:
                return reply.status

        fake.hold()
        first = asyncio.create_task(status())
        await until(lambda: fake.asked == ["99"])
        others = [asyncio.create_task(status()) for _ in range(20)]
        others_yet = asyncio.create_task(client.is_model_ready("m", "99"))
        first.cancel()  # which is nothing to the others
        await asyncio.sleep(0.1)
        fake.go()
        assert [await other for other in others] == [200] * 20
        assert await others_yet
        assert fake.asked == ["99"]
        monkeypatch.setattr(versions, "KEPT", 0.0)
        while len(fake.asked) < 2:  # the answer does not stand for ever
            assert await status() == 200


async def test_upstreams_are_asked_for_few_versions_that_they_do_not_name() -> None:
    fake, most = Counting(), versions.MOST

    async with (
        gateway(fake, grpc_port=0) as (address, _, port),
        aiohttp.ClientSession(address) as session,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):

        async def status(version: int) -> int:
            async with session.get(f"/v2/models/m/versions/{version}/ready") as reply:
                return reply.status

        fake.hold()
        few = [asyncio.create_task(status(100 + i)) for i in range(most)]
        await until(lambda: len(fake.asked) == most)
        assert {await status(1000 + i) for i in range(5)} == {503}
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            await client.is_model_ready("m", "2000")
        named = asyncio.create_task(status(1))
        await until(lambda: len(fake.asked) == most + 1)
        fake.go()
        assert await named == 200
        assert [await one for one in few] == [200] * most
        assert len(fake.asked) == most + 1


async def test_what_nobody_asked_for_is_nobodys_answer() -> None:
    """An upstream that answers twice: the second answer is not the next request's."""

    asked = 0
    again: asyncio.Queue[int] = asyncio.Queue()

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while head := await reader.read(65536):
            asked += 1
            body = json.dumps({"number": asked, "asked": head.decode().split()[1]}).encode()
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            writer.write(answer)
            await asyncio.sleep(0.05)
            writer.write(answer)
            await again.put(asked)
        writer.close()

    server = await asyncio.start_server(twice, "127.0.0.1", 0)
    upstream = open_upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    call = Call("m", "", "http", b"{}", (), time.monotonic() + 10)
    for number in range(1, 4):
        reply = await upstream.infer(call, 10)
        assert json.loads(reply.body)["number"] == number
        assert await again.get() == number
        await asyncio.sleep(0.05)  # what came is read meanwhile
    await upstream.close()
    server.close()
    await asyncio.sleep(0.1)


async def test_the_gateways_own_token_stays_here(tmp_path: Any) -> None:
    fake, token = Fake(), tmp_path / "token"
    token.write_text("secret")

    async with gateway(fake, token_file=token, grpc_port=0) as (address, _, port):
        assert (await ask(address)).status == 401
        assert (await ask(address, authorization="Bearer secret")).status == 200
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask_grpc(port, request(bytes(12)))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await ask_grpc(port, request(bytes(12)), authorization="Bearer secret")
        assert len(fake.seen) == 2
        assert all("authorization" not in headers for _, headers, _ in fake.seen)


async def test_over_grpc_all_is_passed_on_as_it_came() -> None:
    fake = GrpcFake()

    options = {"grpc_port": 0, "cancel": True, "deadline_ms": 60_000}
    async with gateway(fake, **options) as (_, _, port):
        message = request(bytes(12)) + b"\xfa\x3f\x03new"  # a field of a newer client
        body, trailers = await ask_grpc(port, message, timeout=30, traceparent="00-1")
        passed, metadata, left = fake.seen[0]
        assert passed == message
        assert metadata["traceparent"] == "00-1"
        assert 0 < left < 31  # the deadline is passed on, which gRPC rounds
        answer = fake.answer.SerializeToString()
        assert body.startswith(answer)
        assert pb.ModelInferResponse.FromString(body).parameters["outcome"].string_param == "direct"
        assert trailers["codedinvnet-outcome"] == "direct"


async def test_who_has_no_time_left_gets_no_upstreams_answer() -> None:
    fake = Fake()
    async with gateway(fake) as (_, relay, _):
        with pytest.raises(DeadlinePassed):
            await relay.answer("", "http", BODY, (), seconds=0.0)
        assert fake.seen == []


async def test_one_transport_stands_for_the_other() -> None:
    """Over gRPC before an upstream over HTTP, and the other way round."""
    http, rpc = Fake(), GrpcFake()
    async with gateway(http, grpc_port=0) as (_, _, port):
        raw = b"\x01\x02\x03\x04" * 3
        body, _ = await ask_grpc(port, request(raw))
        _, headers, sent = http.seen[0]
        length = int(headers["inference-header-content-length"])
        assert sent[length:] == raw
        head = json.loads(sent[:length])
        assert head["id"] == "7"
        assert head["parameters"]["a"] == 1
        answer = pb.ModelInferResponse.FromString(body)
        assert answer.raw_output_contents == [b"\x07"]
        http.status, http.body = 404, b'{"error":"no such thing"}'
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask_grpc(port, request(raw))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == "no such thing"
    async with gateway(rpc) as (address, _, _):
        reply = await ask(address, traceparent="00-1")
        assert json.loads(reply.body)["outputs"][0]["data"] == [7]
        message = pb.ModelInferRequest.FromString(rpc.seen[0][0])
        assert rpc.seen[0][1]["traceparent"] == "00-1"
        assert len(message.raw_input_contents[0]) == 12
        rpc.code, rpc.details = grpc.StatusCode.INVALID_ARGUMENT, "x is wrong"
        reply = await ask(address)
        assert (reply.status, json.loads(reply.body)) == (400, {"error": "x is wrong"})
        assert (await ask(address, b"{")).status == 400


@pytest.mark.parametrize(
    ("datatype", "raw", "status", "told"),
    [
        ("FP32", b"\x07", 502, "the upstream's answer: outputs: 'y': has 1 bytes"),
        ("BYTES", b"\x07", 502, "the upstream's answer: outputs: 'y': element 0"),
        ("FP32", b"", 502, "the upstream's answer: outputs: 'y': has 0 bytes"),
        ("FP32", b"\0\0\xc0\x7f", 400, "not finite, which JSON cannot carry: ask for binary_data"),
        ("BF16", b"\0\0", 400, "'BF16': ask for binary_data"),
    ],
)
async def test_an_answer_that_cannot_be_read_is_its_upstreams_fault(
    datatype: str, raw: bytes, status: int, told: str
) -> None:
    """What JSON alone cannot carry is its client's."""
    rpc = GrpcFake()
    rpc.answer.outputs[0].datatype, rpc.answer.raw_output_contents[0] = datatype, raw

    async with gateway(rpc) as (address, relay, _):
        reply = await ask(address)
        assert reply.status == status
        assert told in json.loads(reply.body)["error"]
        result = FAILED if status == 502 else ERROR
        assert counted(relay.pool.metrics.calls.labels(rpc.url, result)) == 1
        rpc.answer = SimpleNamespace(SerializeToString=lambda: b"\xff")
        assert (await ask(address)).status == 502


async def test_a_long_error_of_an_upstream_over_grpc_is_still_its_own() -> None:
    rpc = GrpcFake()
    rpc.code, rpc.details = grpc.StatusCode.INVALID_ARGUMENT, "x" * 20_000

    async with gateway(rpc, grpc_port=0) as (address, _, port):
        reply = await ask(address)
        assert (reply.status, json.loads(reply.body)) == (400, {"error": rpc.details})
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask_grpc(port, request(bytes(12)))
        assert refused.value.code() is rpc.code


async def test_metadata_of_grpc_say_nothing_of_a_body_over_http() -> None:
    fake = Fake()
    theirs: Any = {"accept-encoding": "gzip", "transfer-encoding": "chunked", "x-ours": "1"}

    async with gateway(fake, grpc_port=0) as (_, _, port):
        await ask_grpc(port, request(bytes(12)), **theirs)
        _, headers, _ = fake.seen[0]
        assert headers["x-ours"] == "1"
        assert headers.keys().isdisjoint({"accept-encoding", "transfer-encoding"})


async def test_headers_that_grpc_does_not_take_stay_behind() -> None:
    rpc = GrpcFake()
    dropped = {"x-trace-bin": "YQ==", "x!y": "1", "grpc-timeout": "1n", "x-far": "\u00e9"}

    async with gateway(rpc) as (address, *_):
        headers = dropped | {"X-Kept.1": "a b", "x-empty": ""}
        reply = await ask(address, BODY, "/v2/models/m/infer", **headers)
        assert reply.status == 200
        ((_, metadata, _),) = rpc.seen
        assert metadata["x-kept.1"] == "a b"
        assert metadata["x-empty"] == ""
        assert metadata.keys().isdisjoint(dropped)


async def test_large_tensors_pass_over_both_transports() -> None:
    http, rpc = Fake(), GrpcFake()
    large = bytes(range(256)) * 6 * 4096
    http.body = ANSWER + large
    rpc.answer.raw_output_contents[0] = large
    async with gateway(http) as (address, _, _):
        assert (await ask(address, BODY + large)).body.endswith(large)
        assert http.seen[0][2] == BODY + large
    async with gateway(rpc, grpc_port=0) as (_, _, port):
        body, _ = await ask_grpc(port, request(large))
        assert pb.ModelInferResponse.FromString(body).raw_output_contents[0] == large
        assert rpc.seen[0][0] == request(large)


async def test_no_connection_is_taken_while_requests_over_grpc_end() -> None:
    fake = Fake()

    async with gateway(fake, grpc_port=0) as (address, relay, port):
        fake.hold()
        asked = asyncio.create_task(ask_grpc(port, request(bytes(12))))
        await until(lambda: len(fake.seen) == 1)
        relay.front.announce_draining()  # as SIGTERM does first
        await asyncio.sleep(0.5)
        assert not asked.done()
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(address)
        fake.go()
        await asked


async def test_what_else_there_is() -> None:
    fake = Fake()

    async with gateway(fake, grpc_port=0) as (address, _, port):
        async with aiohttp.ClientSession(address) as session:
            for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/m/ready", "/v2"):
                async with session.get(path) as reply:
                    assert reply.status == 200
            async with session.get("/v2/models/m") as reply:
                assert await reply.json() == fake.metadata
            async with session.get("/v2/models/other") as reply:
                assert reply.status == 404
        assert (await ask(address, path="/v2/models/other/infer")).status == 404
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stream.read()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for message, code in (
            (b"\x0a\x05other", grpc.StatusCode.NOT_FOUND),
            (b"\x0a\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask_grpc(port, message)
            assert refused.value.code() is code
