"""The gateway before upstreams of this process: what is passed on, and who is asked."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import grpc
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from codedinvnet.serving.faces.grpc_stubs import SERVICE, UNLIMITED
from codedinvnet.serving.gateway.calls import Call
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.upstreams import open_upstream
from codedinvnet.serving.rules.recent import FEWEST
from tests.observing import until as until
from tests.serving.gateway.fakes import ANSWER, Fake, GrpcFake, gateway

BODY = b'{ "inputs": [{"name":"x", "datatype":"FP32","shape":[1,3],"data":[0.10,1e-3,5]}]}'
OUTCOME = b'"parameters":{"outcome":"direct"},'


class Got:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


async def ask(
    address: str,
    body: bytes = BODY,
    path: str = "/v2/models/m/infer",
    **headers: str,
) -> Got:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(address + path, data=io.BytesIO(body), headers=named) as reply,
    ):
        return Got(reply.status, reply.headers, await reply.read())


async def ask_grpc(port: int | None, message: bytes, timeout: float = 10, **metadata: str) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", UNLIMITED) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")(
            message, timeout=timeout, metadata=tuple(metadata.items())
        )
        return await call, dict(await call.trailing_metadata())


def request(*raw: bytes) -> bytes:
    message = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=raw)
    message.parameters["a"].int64_param = 1
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    found: bytes = message.SerializeToString()
    return found


def is_up(relay: Relay) -> list[bool]:
    return [place.up for place in relay.pool.places]


async def ask_until(condition: Callable[[], bool], address: str) -> None:
    """Go on asking, though another upstream answers: one that is tried again is found out so."""
    end = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end
        reply = await ask(address)
        assert (reply.status, reply.body) == (200, ANSWER[:1] + OUTCOME + ANSWER[1:])
        await asyncio.sleep(0.01)


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


async def test_a_version_that_no_upstream_has_is_not_ready() -> None:
    """Over both faces."""
    fake = Fake()

    async with (
        gateway(fake, grpc_port=0) as (address, _, port),
        aiohttp.ClientSession(address) as session,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        path = "/v2/models/m/versions/99/ready"
        async with session.get(path) as reply:
            assert (reply.status, (await reply.json())["ready"]) == (200, True)
        assert await client.is_model_ready("m", "99")
        fake.metadata = None
        async with session.get(path) as reply:
            assert (reply.status, list(await reply.json())) == (404, ["error"])
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            await client.is_model_ready("m", "99")
        async with session.get("/v2/models/m/ready") as reply:
            assert (reply.status, (await reply.json())["ready"]) == (200, True)


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


async def test_an_error_of_the_model_is_an_answer() -> None:
    fakes = Fake(), Fake()
    for fake in fakes:
        fake.status, fake.body = 400, b'{"error":"x must not be negative"}'

    async with gateway(*fakes) as (address, relay, _):
        for i in range(10):
            reply = await ask(address)
            assert (reply.status, reply.body) == (400, fakes[0].body)
            assert sum(len(fake.seen) for fake in fakes) == i + 1
        assert is_up(relay) == [True, True]


async def test_who_fails_everything_is_set_aside_and_tried_again() -> None:
    good, bad = Fake(), Fake()

    async with gateway(good, bad, policy="uncoded", slots=1) as (address, relay, _):
        bad.status, bad.body = 500, b"no memory"
        end = time.monotonic() + 2.0
        await ask_until(lambda: time.monotonic() > end, address)
        await ask_until(lambda: is_up(relay) == [True, False], address)
        assert 3 < len(bad.seen) < 9  # three, and then one whenever it is tried again
        bad.status, bad.body = 200, ANSWER
        await until(lambda: is_up(relay) == [True, True])
        before = len(bad.seen)
        for _ in range(30):
            assert (await ask(address)).status == 200
        assert len(bad.seen) > before


async def test_who_hangs_up_is_set_aside_though_it_is_ready() -> None:
    good, bad = Fake(), Fake()

    async with gateway(good, bad, policy="uncoded", slots=1) as (address, relay, _):
        bad.hangs_up = True
        for _ in range(30):
            assert (await ask(address)).status == 200
        await ask_until(lambda: is_up(relay) == [True, False], address)
        assert len(bad.seen) < 20  # each twice: a kept connection may be closed at any time
        bad.hangs_up = False
        await until(lambda: is_up(relay) == [True, True])


async def test_who_refuses_connections_gets_nothing_but_probes() -> None:
    good, dead = Fake(), Fake()

    async with gateway(good, dead, policy="uncoded") as (address, relay, _):
        await dead.stop()
        for _ in range(20):
            assert (await ask(address)).status == 200
        await until(lambda: is_up(relay) == [True, False])
        await dead.start()
        await until(lambda: is_up(relay) == [True, True])
        assert dead.seen == []


async def test_who_comes_back_with_another_model_stays_aside() -> None:
    good, other = Fake(), Fake()

    async with gateway(good, other) as (_, relay, _):
        await other.stop()
        await until(lambda: is_up(relay) == [True, False])
        mine = other.metadata
        other.metadata = {**mine, "outputs": []}
        before = other.probes
        await other.start()
        await until(lambda: other.probes >= before + 2)
        assert is_up(relay) == [True, False]
        other.metadata = mine
        await until(lambda: is_up(relay) == [True, True])


async def test_not_all_are_set_aside_at_once() -> None:
    fakes = Fake(), Fake()

    async with gateway(*fakes, policy="uncoded") as (address, relay, _):
        for fake in fakes:
            fake.status, fake.body = 500, b'{"error":"poison"}'
        for _ in range(30):
            reply = await ask(address)
            assert (reply.status, reply.body) == (500, b'{"error":"poison"}')
            assert reply.headers["codedinvnet-outcome"] in ("failed", "direct")
        assert any(is_up(relay))
        for fake in fakes:
            fake.status, fake.body = 200, ANSWER
        assert (await ask(address)).status == 200


@pytest.mark.parametrize("kind", [Fake, GrpcFake])
async def test_what_all_upstreams_fail_is_not_asked_for_ever(kind: type[Fake | GrpcFake]) -> None:
    """Retries are a share of the calls, once those that were saved up are spent."""
    fakes = [kind() for _ in range(4)]

    options = {"policy": "uncoded", "grpc_port": 0, "deadline_ms": 60_000}
    async with gateway(*fakes, **options) as (address, _, port):
        for fake in fakes:
            if isinstance(fake, GrpcFake):
                fake.code, fake.details = grpc.StatusCode.UNAVAILABLE, "overloaded"
            else:
                fake.status = 503
        replies = await asyncio.gather(*(ask(address) for _ in range(400)))
        assert {reply.status for reply in replies} == {503}
        assert sum(len(fake.seen) for fake in fakes) < 400 + 50 + 0.1 * 600
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask_grpc(port, request(bytes(12)))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_may_have_been_the_connection_is_asked_again() -> None:
    class Once(GrpcFake):
        async def _infer(self, message: bytes, context: Any) -> bytes:
            self.code = grpc.StatusCode.OK if self.seen else grpc.StatusCode.UNAVAILABLE
            return await super()._infer(message, context)

    fake = Once()
    async with gateway(fake) as (address, _, _):
        assert (await ask(address)).status == 200
        assert len(fake.seen) == 2


async def test_a_silent_upstream_is_noticed_without_a_call() -> None:
    good, hung = Fake(), Fake()

    async with gateway(good, hung) as (_, relay, _):
        hung.ready = False
        await until(lambda: is_up(relay) == [True, False])
        good.ready, before = False, good.probes  # the last one
        await until(lambda: good.probes >= before + 4)
        assert is_up(relay) == [True, False]


async def test_a_late_answer_is_asked_of_another() -> None:
    slow, quick = Fake(), GrpcFake()

    async with gateway(slow, quick, slots=1, deadline_ms=60_000) as (address, _, _):
        for i in range(40):  # what is late is learnt first
            assert (await ask(address)).status == 200, i
        slow.delay = 30.0
        began = time.monotonic()
        replies = await asyncio.gather(*(ask(address) for _ in range(2)))
        assert [reply.status for reply in replies] == [200, 200]
        assert time.monotonic() - began < 20


async def test_a_large_request_is_not_late_because_small_ones_take_less_time() -> None:
    large = BODY + b" " * 5000
    async with gateway(one := Fake(), other := Fake()) as (address, _, _):
        for _ in range(FEWEST + 5):
            await ask(address)
        one.delay = other.delay = 0.5
        await ask(address, large)
        bodies = [body for fake in (one, other) for _, _, body in fake.seen]
        assert bodies.count(large) == 1


@pytest.mark.parametrize("cancel", [True, False])
async def test_what_nobody_needs_any_more_is_cancelled_if_that_is_asked_for(cancel: bool) -> None:
    slow, quick = GrpcFake(), Fake()

    async with gateway(slow, quick, policy="replicate", cancel=cancel) as (address, relay, _):
        slow.delay = 30.0
        quick.hold()
        asked = asyncio.create_task(ask(address))
        await until(lambda: len(slow.seen) == 1)  # it has begun
        quick.go()
        await asked
        if cancel:
            await until(lambda: slow.cancelled == 1)
        else:
            await asyncio.sleep(0.5)
            assert slow.cancelled == 0
        assert len(slow.seen) == 1
        assert len(relay.front.times.traffic.tasks) == 1  # what was stopped was not done


async def test_an_upstream_is_at_as_many_requests_as_it_has_slots() -> None:
    """However few were asked of it before: more are refused only if they would come too late."""
    fake = Fake()

    async with gateway(fake, slots=4, deadline_ms=1500) as (address, _, _):
        fake.delay = 0.5
        for few in (2, 2, 2, 2):
            await asyncio.gather(*(ask(address) for _ in range(few)))
        replies = await asyncio.gather(*(ask(address) for _ in range(4)))
        assert [reply.status for reply in replies] == [200] * 4


@pytest.mark.parametrize("kind", [Fake, GrpcFake])
async def test_the_deadline_ends_a_request(kind: type[Fake | GrpcFake]) -> None:
    fake = kind()

    async with gateway(fake, deadline_ms=500, grpc_port=0, cancel=True) as (address, _, port):
        fake.delay = 30
        began = time.monotonic()
        assert (await ask(address)).status == 504
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await ask_grpc(port, request(bytes(12)), timeout=0.2)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - began < 5


async def test_who_hangs_is_set_aside_though_its_clients_have_left() -> None:
    good, bad = Fake(), Fake()

    async with gateway(good, bad, policy="uncoded", deadline_ms=900) as (address, relay, _):
        bad.delay = 30
        await asyncio.gather(*(ask(address) for _ in range(12)))
        await until(lambda: relay.front.workers[1].deaths > 0)
        assert relay.front.workers[0].deaths == 0


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
