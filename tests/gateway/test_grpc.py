"""gRPC through the gateway, byte for byte: hedged, failed over, and never sent twice if unsafe."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import running

grpc = pytest.importorskip("grpc")
INFER = "/inference.GRPCInferenceService/ModelInfer"
ECHO, WRITE = "/some.Service/Echo", "/some.Service/Write"
Answer = Callable[[bytes, Any], Awaitable[bytes]]


class Upstream:
    """A gRPC server in this loop, for any method; it is ready by its answers' first bytes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.answer: Answer = echo
        self.port = 0

    async def __aenter__(self) -> Upstream:
        upstream = self

        class Handlers(grpc.GenericRpcHandler):  # type: ignore[name-defined,misc]
            def service(self, details: Any) -> Any:
                async def answer(message: bytes, context: Any) -> bytes:
                    if details.method.endswith("ServerReady"):
                        return b"\x08\x01"
                    upstream.seen.append((details.method, message))
                    return await upstream.answer(message, context)

                return grpc.unary_unary_rpc_method_handler(answer)

        options = (("grpc.so_reuseport", 0),)
        self.server = grpc.aio.server(handlers=(Handlers(),), options=options)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
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
    options = {"deadline_ms": 10_000, "hedge": (f"POST {ECHO}",), **options}
    settings = GatewayOptions(upstream=urls, port=0, grpc_port=0, **options)
    async with (
        running(settings) as found,
        grpc.aio.insecure_channel(f"127.0.0.1:{found.grpc_port}") as channel,
    ):
        yield channel


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


async def test_late_calls_are_hedged_and_unsafe_ones_never_sent_twice() -> None:
    async with Upstream() as one, Upstream() as two, gateway(one, two) as channel:
        infer, write = channel.unary_unary(INFER), channel.unary_unary(WRITE)
        for i in range(60):
            assert await infer(b"%04d" % i) == b"%04d" % i

        async def stall(message: bytes, context: Any) -> bytes:
            await asyncio.sleep(1.0 * (int(message[-4:]) % 10 == 0))
            return message

        one.answer = stall
        began = asyncio.get_running_loop().time()
        for i in range(60):
            assert await infer(b"%04d" % i) == b"%04d" % i
        assert asyncio.get_running_loop().time() - began < 2.0
        one.answer = two.answer = stall
        one.seen.clear()
        two.seen.clear()
        stateful = b"sequence_id"
        await asyncio.gather(
            *(write(b"%04d" % i) for i in range(60)),
            *(infer(stateful + b"%04d" % i) for i in range(60)),
        )
        seen = [*one.seen, *two.seen]
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
