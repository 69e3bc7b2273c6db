"""gRPC through the gateway, byte for byte: hedged, failed over, and never sent twice if unsafe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import running
from codedinvnet.net.client import HttpClient, parse_origin
from tests.gateway.test_run import make_pair
from tests.observing import until
from tests.upstream import Upstream as HttpUpstream
from tests.upstream import saying

grpc = pytest.importorskip("grpc")
INFER = "/inference.GRPCInferenceService/ModelInfer"
ECHO, WRITE = "/some.Service/Echo", "/some.Service/Write"
Answer = Callable[[bytes, Any], Awaitable[bytes]]


class Upstream:
    """A gRPC server in this loop, for any method; it is ready by its answers' first bytes."""

    def __init__(self, credentials: Any = None, probed: Any = None) -> None:
        self.credentials, self.probed = credentials, probed
        self.seen: list[tuple[str, bytes]] = []
        self.answer: Answer = echo
        self.port = 0

    async def __aenter__(self) -> Upstream:
        upstream = self

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[name-defined,misc]
            def service(self, details: Any) -> Any:
                async def answer(message: bytes, context: Any) -> bytes:
                    if details.method.endswith("ServerReady"):
                        if upstream.probed is not None:
                            await context.abort(upstream.probed, "")
                        return b"\x08\x01"
                    upstream.seen.append((details.method, message))
                    return await upstream.answer(message, context)

                return grpc.unary_unary_rpc_method_handler(answer)

        options = (("grpc.so_reuseport", 0),)
        self.server = grpc.aio.server(handlers=(Handlers(),), options=options)
        where = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self.server.add_insecure_port(where)
        else:
            self.port = self.server.add_secure_port(where, self.credentials)
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(None)


async def echo(message: bytes, context: Any) -> bytes:
    sent = dict(context.invocation_metadata())
    await context.send_initial_metadata([("first", sent.get("mine", ""))])
    context.set_trailing_metadata([("last-bin", b"\x00\xff"), ("hedged", sent.get("x-hedge", ""))])
    await asyncio.sleep(0.005)
    return message


@contextlib.asynccontextmanager
async def gateway(*upstreams: Upstream, **options: Any) -> AsyncIterator[Any]:
    urls = tuple(f"grpc://127.0.0.1:{upstream.port}" for upstream in upstreams)
    options = {"deadline_ms": 10_000, "route": (f"POST {ECHO} hedge=on",), **options}
    settings = GatewayOptions(upstream=urls, port=0, grpc_port=0, **options)
    async with (
        running(settings) as found,
        grpc.aio.insecure_channel(f"127.0.0.1:{found.grpc_port}") as channel,
    ):
        yield channel


@pytest.mark.parametrize(("said", "told"), [("low", "low"), ("HIGH", "normal"), ("?", "normal")])
async def test_clients_may_step_back_and_not_push_forward(said: str, told: str) -> None:
    async def tell(message: bytes, context: Any) -> bytes:
        return str(dict(context.invocation_metadata()).get("x-priority")).encode()

    async with Upstream() as one, gateway(one) as channel:
        one.answer = tell
        ask = channel.unary_unary(ECHO)
        assert await ask(b"", metadata=[("x-priority", said)]) == told.encode()
        assert await ask(b"") == b"None"


async def test_messages_metadata_and_errors_pass_as_they_are() -> None:
    async with Upstream() as one, gateway(one) as channel:
        for method in (ECHO, INFER):
            message = b"\x00any bytes\xff" * 100_000
            call = channel.unary_unary(method)(
                message, metadata=[("mine", "7"), ("x-hedge", "off")]
            )
            assert await call == message
            assert dict(await call.initial_metadata())["first"] == "7"
            trailing = dict(await call.trailing_metadata())
            assert (trailing["last-bin"], trailing["hedged"]) == (b"\x00\xff", "")

        async def refuse(_: bytes, context: Any) -> bytes:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x: no ä", (("why", "x"),))
            raise AssertionError

        one.answer = refuse
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary(INFER)(b"")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "x: no ä"
        assert dict(error.value.trailing_metadata())["why"] == "x"
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"") == b"\x08\x01"
        stream = channel.unary_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream(b"").read()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"])
async def test_a_server_that_refuses_probes_is_up(code: str) -> None:
    async with Upstream(probed=grpc.StatusCode[code]) as one, gateway(one) as channel:
        assert await channel.unary_unary(ECHO)(b"x") == b"x"


async def test_late_calls_are_hedged_and_unsafe_ones_never_sent_twice() -> None:
    async with Upstream() as one, Upstream() as two, gateway(one, two) as channel:
        infer, write = channel.unary_unary(INFER), channel.unary_unary(WRITE)
        for i in range(60):
            assert await infer(b"%04d" % i) == b"%04d" % i

        async def stall(message: bytes, context: Any) -> bytes:
            await asyncio.sleep(2.0 * (int(message[-4:]) % 10 == 0))
            return message

        one.answer = stall
        began = asyncio.get_running_loop().time()
        for i in range(60):
            assert await infer(b"%04d" % i) == b"%04d" % i
        assert asyncio.get_running_loop().time() - began < 4.0  # three stalls are six seconds
        one.answer = two.answer = stall
        one.seen.clear()
        two.seen.clear()
        stateful = b"sequence_id"
        await asyncio.gather(
            *(write(b"%04d" % i) for i in range(60)),
            *(infer(stateful + b"%04d" % i) for i in range(60)),
        )
        # A copy of the last safe call may have been on its way when `seen` was cleared.
        seen = [call for call in (*one.seen, *two.seen) if call != (INFER, b"0059")]
        assert len(seen) == len(set(seen)) == 120


async def test_a_dead_upstream_and_one_that_fails_lose_nothing() -> None:
    async with Upstream() as one, Upstream() as two, gateway(one, two) as channel:
        infer = channel.unary_unary(INFER)

        async def ask(count: int) -> None:
            for i in range(count):
                assert await infer(b"%d" % i) == b"%d" % i

        await ask(20)
        await one.server.stop(None)
        await ask(20)

        async def fail(_: bytes, context: Any) -> bytes:
            await context.abort(grpc.StatusCode.INTERNAL, "broken")
            raise AssertionError

        async with one:
            await asyncio.sleep(1.5)  # it is probed once more, and comes back
            two.answer = fail
            await ask(20)
            one.answer = fail
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await infer(b"", timeout=5)
            assert error.value.code() is grpc.StatusCode.INTERNAL
            assert error.value.details() == "broken"


async def test_refused_calls_are_counted() -> None:
    options = GatewayOptions(upstream=("grpc://127.0.0.1:1",), port=0, grpc_port=0)
    async with running(options) as found:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{found.grpc_port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(INFER)(b"x")
        labels = {"route": f"POST {INFER}", "outcome": "refused", "status": "5xx"}
        name = "codedinvnet_gateway_requests_total"
        assert found.metrics.registry.get_sample_value(name, labels) == 1


async def test_no_call_is_taken_while_http_drains() -> None:
    async with HttpUpstream(saying(b"late", after=1.0)) as http, Upstream() as one:
        urls = (http.url, f"grpc://127.0.0.1:{one.port}")
        route = (f"POST {ECHO} hedge=on",)
        options = GatewayOptions(upstream=urls, port=0, grpc_port=0, route=route)
        async with running(options) as found:
            client = HttpClient(parse_origin(found.url))
            late = asyncio.create_task(client.ask("POST", "/orders", 5.0, b"x"))
            await until(lambda: bool(http.requests))
            stopping = asyncio.create_task(found.stop())
            await asyncio.sleep(0.1)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{found.grpc_port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await channel.unary_unary(ECHO)(b"x")
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert (await late).body == b"late"
            await stopping
            client.close()


async def test_tls_on_both_sides(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    key, cert = pair["tls_key"].read_bytes(), pair["tls_cert"].read_bytes()
    async with Upstream(grpc.ssl_server_credentials([(key, cert)])) as upstream:
        url = f"grpcs://localhost:{upstream.port}"
        options = GatewayOptions(
            upstream=(url,), port=0, grpc_port=0, upstream_ca=pair["tls_cert"], **pair
        )
        trusting = grpc.ssl_channel_credentials(cert)
        async with running(options) as found:
            target = f"localhost:{found.grpc_port}"
            async with grpc.aio.secure_channel(target, trusting) as channel:
                assert await channel.unary_unary(INFER)(b"m") == b"m"
            context = ssl.create_default_context(cafile=str(pair["tls_cert"]))
            client = HttpClient(parse_origin(found.url), context)
            status = json.loads((await client.ask("GET", "/codedinvnet/status", 5.0)).body)
            client.close()

    (shown,), (route,) = status["upstreams"], status["routes"]
    assert (shown["url"], shown["up"], route["name"]) == (url, True, f"POST {INFER}")
    assert route["p50_ms"] > 0
