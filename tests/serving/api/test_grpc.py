"""What clients over gRPC may take: messages on their way, unread answers, long errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.net import grpc as net_grpc
from codedinvnet.net.guard import Guard
from codedinvnet.net.protocol.grpc import SERVICE
from codedinvnet.serving.answers import QueryFailed
from codedinvnet.serving.api import grpc as api
from codedinvnet.serving.api.bodies import BodyMemory
from codedinvnet.serving.api.grpc import GrpcApi
from codedinvnet.serving.dispatch import Dispatcher
from codedinvnet.serving.served import OwnModel
from tests.serving.stub import Stub, token_of

LIMIT = 8 << 20
"""Bytes of a message, and of all."""
INFER = f"/{SERVICE}/ModelInfer"
READY = f"/{SERVICE}/ModelReady"
LIVE = f"/{SERVICE}/ServerLive"
KNOWN = (("authorization", "Bearer secret"),)
ECHO = OwnModel("echo", Signature((TensorSpec("x", "BYTES", ()),), (TensorSpec("y", "BYTES", ()),)))


def echo(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": inputs["x"]}


def message(text: bytes = b"1") -> bytes:
    made = pb.ModelInferRequest(model_name="echo")
    made.inputs.add(name="x", datatype="BYTES", shape=[1])
    made.outputs.add(name="y")
    made.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    serialized: bytes = made.SerializeToString()
    return serialized


def text_of(answer: bytes) -> bytes:
    (raw,) = pb.ModelInferResponse.FromString(answer).raw_output_contents
    return bytes(raw[4:])


@asynccontextmanager
async def serving(
    error: Exception | None = None,
    *,
    token: str = "",
    deadline: float = 20.0,
    limit: int = LIMIT,
    ready: bool = True,
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve; yields a channel."""
    stub = Stub(compute=echo, deadline=deadline, ready=ready)
    stub.error = error
    memory = BodyMemory(limit, cast(Dispatcher, stub))
    api = GrpcApi(stub.service(ECHO, 1 << 20, limit), memory, Guard((), token_of(token)))
    async with (
        api.listening("127.0.0.1", 0) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends, and the message."""
    return await asyncio.wait_for(call.code(), 20), await call.details() or ""


async def test_a_token_is_looked_at_before_a_message_is_here() -> None:
    async with serving(token="secret") as channel:
        code, told = await ended(channel.stream_unary(INFER)())
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "bearer token" in told
        assert await channel.unary_unary(INFER)(message(), metadata=KNOWN)


@pytest.mark.parametrize("method", [INFER, READY])
async def test_a_message_must_come_in_time(method: str) -> None:
    async with serving(deadline=0.1) as channel:
        code, told = await ended(channel.stream_unary(method)())
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert told == "message: not here after 0.1 s"


async def test_a_request_without_a_message() -> None:
    async with serving() as channel:
        call = channel.stream_unary(INFER)()
        await call.done_writing()
        assert await ended(call) == (grpc.StatusCode.INVALID_ARGUMENT, "message: there is none")


async def test_a_message_that_is_too_large() -> None:
    async with serving() as channel:
        code, _ = await ended(channel.unary_unary(INFER)(bytes(LIMIT + 1)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text_of(await channel.unary_unary(INFER)(message())) == b"1"


@pytest.mark.parametrize("method", [READY, f"/{SERVICE}/ModelMetadata"])
async def test_only_inference_has_long_messages(method: str) -> None:
    async with serving() as channel:
        code, told = await ended(channel.unary_unary(method)(bytes((64 << 10) + 1)))
        assert (code, told) == (grpc.StatusCode.INVALID_ARGUMENT, "message: more than 64 KiB")
        found = text_of(await channel.unary_unary(INFER)(message(bytes(64 << 10))))
        assert len(found) == 64 << 10


async def test_strangers_keep_no_turn_from_who_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FEWEST_READ", 1)
    async with serving(token="secret") as channel:
        stranger = channel.stream_unary(READY)()
        await stranger.wait_for_connection()
        assert await channel.unary_unary(INFER)(message(), metadata=KNOWN, timeout=20)
        live = pb.ServerLiveResponse.FromString(await channel.unary_unary(LIVE)(b"", timeout=20))
        assert live.live
        assert not stranger.done()
        await stranger.done_writing()
        await ended(stranger)


async def test_an_answer_that_is_not_read_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_grpc, "FEWEST_CALLS", 1)
    monkeypatch.setattr(net_grpc, "MOST_CALLS", 1)
    monkeypatch.setattr(net_grpc, "LONGEST_UNREAD", 1e9)
    async with serving() as channel:
        unread = channel.unary_stream(INFER)(message(bytes(LIMIT - 1000)))
        await unread.initial_metadata()  # the answer has begun
        answered = channel.unary_unary(INFER)
        assert await answered(message(), timeout=20).code() is grpc.StatusCode.UNAVAILABLE
        monkeypatch.setattr(net_grpc, "LONGEST_UNREAD", 0.0)
        with suppress(grpc.aio.AioRpcError):  # its client's connection is closed
            while True:
                await asyncio.sleep(0.1)
                if await answered(message(), timeout=20).code() is grpc.StatusCode.OK:
                    break
        assert text_of(await answered(message(), wait_for_ready=True, timeout=20)) == b"1"
        with suppress(grpc.aio.AioRpcError):
            await unread.read()


@pytest.mark.parametrize("text", ["x" * 20_000, "\u00e4" * 20_000, "\n" * 20_000])
async def test_a_long_error_keeps_its_code(text: str) -> None:
    internal = grpc.StatusCode.INTERNAL
    async with serving(QueryFailed(text)) as channel:
        code, told = await ended(channel.unary_unary(INFER)(message()))
    assert code is internal
    assert told.endswith("...")
    assert text.startswith(told.removesuffix("..."))


async def test_kubernetes_health_checks_are_answered() -> None:
    """It needs no token; whether a service is meant is nothing to it."""
    async with serving(token="secret") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"", timeout=20) == b"\x08\x01"  # SERVING
        assert await check(b"\x0a\x01m", timeout=20) == b"\x08\x01"
    async with serving(ready=False) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"", timeout=20) == b"\x08\x02"  # NOT_SERVING
