"""What clients over gRPC may take: messages on their way, unread answers, long errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, Counter
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.serving.answers import Draining, NoneUp, NotNow, Overloaded, QueryFailed, Starting
from codedinvnet.serving.bodies import BodyMemory
from codedinvnet.serving.faces import grpc as faces
from codedinvnet.serving.faces.grpc import GrpcFace, Headers, Refused
from codedinvnet.serving.faces.grpc_stubs import SERVICE

LIMIT = 8 << 20
"""Bytes of a message, and of all."""
INFER = f"/{SERVICE}/ModelInfer"
READY = f"/{SERVICE}/ModelReady"
LIVE = f"/{SERVICE}/ServerLive"
KNOWN = (("authorization", "Bearer secret"),)


class Echo:
    """Answers a message with itself, or with an error."""

    is_live = is_ready = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def metadata(self, model: str, version: str) -> Mapping[str, Any]:
        return {}

    async def infer(
        self, message: bytes, seconds: float | None, headers: Headers, hold: Callable[[int], None]
    ) -> tuple[bytes, Headers]:
        if self.error is not None:
            raise self.error
        return message, ()


def refuse(queries: int) -> None:
    raise Overloaded(1)


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
    requests = Counter("requests", "of the test", ["code"], registry=CollectorRegistry())
    memory = BodyMemory(limit, refuse)
    echo = Echo(error)
    echo.is_ready = ready
    face = GrpcFace(echo, memory, requests, token=token, max_message=limit)
    async with (
        face.listening("127.0.0.1", 0, deadline) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


async def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends, and what is told."""
    return await asyncio.wait_for(call.code(), 20), await call.details() or ""


async def taken(call: Any) -> int:
    """Return how many bytes a server takes of a request that it does not read."""
    sent, part = 0, bytes(1 << 14)
    while sent < LIMIT:
        writing = asyncio.ensure_future(call.write(part))
        await asyncio.wait({writing}, timeout=1.0)
        if not writing.done():
            break
        sent += len(part)
    return sent


async def test_a_token_is_looked_at_before_a_message_is_here() -> None:
    async with serving(token="secret") as channel:
        code, told = await ended(channel.stream_unary(INFER)())
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "bearer token" in told
        assert await channel.unary_unary(INFER)(b"1", metadata=KNOWN) == b"1"


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
        assert await channel.unary_unary(INFER)(b"1") == b"1"


@pytest.mark.parametrize("method", [READY, f"/{SERVICE}/ModelMetadata"])
async def test_only_inference_has_long_messages(method: str) -> None:
    async with serving() as channel:
        code, told = await ended(channel.unary_unary(method)(bytes((64 << 10) + 1)))
        assert (code, told) == (grpc.StatusCode.INVALID_ARGUMENT, "message: more than 64 KiB")
        assert len(await channel.unary_unary(INFER)(bytes((64 << 10) + 1))) == (64 << 10) + 1


@pytest.mark.parametrize("limit", [2**31 - 1, 2**31, 2**40])
async def test_memory_beyond_what_grpc_can_count(limit: int) -> None:
    async with serving(limit=limit) as channel:
        assert await channel.unary_unary(INFER)(b"1") == b"1"


async def test_so_many_messages_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait, and nearly all of them with their clients."""
    monkeypatch.setattr(faces, "FEWEST_READ", 1)
    async with serving() as channel:
        stalled = channel.stream_unary(INFER)()
        await stalled.wait_for_connection()
        await channel.unary_unary(LIVE)(b"")  # by now the stalled one has its turn
        waiting = channel.stream_unary(INFER)()
        assert await taken(waiting) < LIMIT // 16
        await stalled.done_writing()
        assert len(await waiting) == 1 << 14
        assert await channel.unary_unary(INFER)(b"1", timeout=20) == b"1"


async def test_strangers_keep_no_turn_from_who_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "FEWEST_READ", 1)
    async with serving(token="secret") as channel:
        stranger = channel.stream_unary(READY)()
        await stranger.wait_for_connection()
        assert await channel.unary_unary(INFER)(b"1", metadata=KNOWN, timeout=20) == b"1"
        live = pb.ServerLiveResponse.FromString(await channel.unary_unary(LIVE)(b"", timeout=20))
        assert live.live
        assert not stranger.done()
        await stranger.done_writing()
        await ended(stranger)


async def test_an_answer_that_nobody_reads_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "FEWEST_REQUESTS", 1)
    monkeypatch.setattr(faces, "MOST_REQUESTS", 1)
    monkeypatch.setattr(faces, "LONGEST_CONNECTION", 0.5)
    monkeypatch.setattr(faces, "LAST_REQUESTS", 0.0)
    async with serving(deadline=0.5) as channel:
        unread = channel.unary_stream(INFER)(bytes(LIMIT))
        await unread.wait_for_connection()
        codes: list[grpc.StatusCode] = []
        while not codes or codes[-1] is not grpc.StatusCode.OK:
            codes.append(await channel.unary_unary(INFER)(b"1", timeout=20).code())
            await asyncio.sleep(0.02)
            assert len(codes) < 1000
        assert codes[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        with suppress(grpc.aio.AioRpcError):
            await unread.read()


@pytest.mark.parametrize("text", ["x" * 20_000, "\u00e4" * 20_000, "\n" * 20_000])
@pytest.mark.parametrize("own", [True, False])
async def test_a_long_error_keeps_its_code(text: str, own: bool) -> None:
    internal = grpc.StatusCode.INTERNAL
    error = QueryFailed(text) if own else Refused(internal.value[0], text)
    async with serving(error) as channel:
        code, told = await ended(channel.unary_unary(INFER)(b"1"))
    assert code is internal
    assert told.endswith("...")
    assert text.startswith(told.removesuffix("..."))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Starting(), "starting"),
        (NoneUp("upstream"), "no upstream is up"),
        (Overloaded(1), "overloaded"),
        (Draining(), "shutting down"),
    ],
)
async def test_whoever_may_try_again_hears_why(error: NotNow, words: str) -> None:
    async with serving(error) as channel:
        code, told = await ended(channel.unary_unary(INFER)(b"1"))
    assert (code, told) == (grpc.StatusCode.UNAVAILABLE, f"{words}: try again later")


async def test_an_error_of_our_own_is_logged_as_one(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(RuntimeError("why")) as channel:
        code, told = await ended(channel.unary_unary(INFER)(b"1"))
    assert (code, told) == (grpc.StatusCode.INTERNAL, "internal error: RuntimeError")
    (record,) = (r for r in caplog.records if r.getMessage() == "internal error")
    assert record.levelno == logging.ERROR
    fields = record.__dict__["fields"]
    assert fields == {"path": INFER, "reason": "RuntimeError: why"}


async def test_health_is_told_as_kubernetes_asks_for_it() -> None:
    """It needs no token; whether a service is meant is nothing to it."""
    async with serving(token="secret") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"", timeout=20) == b"\x08\x01"  # SERVING
        assert await check(b"\x0a\x01m", timeout=20) == b"\x08\x01"
    async with serving(ready=False) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"", timeout=20) == b"\x08\x02"  # NOT_SERVING
