"""Connections to upstreams over gRPC: when they end, and when others take their place."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from codedinvnet.serving.gateway import grpc_upstream, pool, roster
from codedinvnet.serving.gateway.calls import Call, Unreachable
from codedinvnet.serving.gateway.upstreams import open_upstream
from tests.observing import until
from tests.serving.gateway.asking import ask
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway


class Late(GrpcFake):
    """Answers inference requests when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.begun = self.answered = 0

    async def _infer(self, message: bytes, context: Any) -> bytes:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.answered += 1
        return await super()._infer(message, context)


class Wire:
    """Passes on what clients and a server say, over connections that may die without a word."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, ""
        self.living: set[asyncio.StreamWriter] = set()
        """The clients' ends of connections that pass anything on."""
        self.made = 0
        self.at_it: set[Any] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        self.at_it.add(asyncio.current_task())
        self.living.add(writer)
        theirs, ours = await asyncio.open_connection("127.0.0.1", self.port)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(65536):
                    if writer in self.living:
                        sink.write(data)
            ours.close()
            writer.close()

        await asyncio.gather(pass_on(reader, ours), pass_on(theirs, writer))

    def die(self) -> None:
        self.living.clear()


@asynccontextmanager
async def wire(fake: GrpcFake) -> AsyncIterator[Wire]:
    await fake.start()
    between = Wire(fake.port)
    listening = await asyncio.start_server(between.serve, "127.0.0.1", 0)
    between.url = f"grpc://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield between
    finally:
        listening.close()
        await asyncio.gather(*between.at_it)


@pytest.mark.parametrize("kind", [Fake, GrpcFake])
async def test_no_proxy_is_asked(
    kind: type[Fake | GrpcFake], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    try:
        async with gateway(kind()) as (address, *_):
            assert (await ask(address)).status == 200
    finally:
        proxy.close()
    assert asked == []


async def test_a_connection_that_died_without_a_word_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "PROBE_PERIOD", 0.05)
    fake = GrpcFake()

    async with (
        wire(fake) as between,
        gateway(fake, upstream=(between.url,), deadline_ms=60_000) as (address, *_),
    ):
        assert (await ask(address)).status == 200
        assert between.made == 1
        between.die()
        before = fake.probes
        await until(lambda: fake.probes >= before + 2)
        assert (await ask(address)).status == 200


async def test_a_connection_is_not_used_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked over an old one is answered."""
    monkeypatch.setattr(grpc_upstream, "OLDEST", 0.2)
    late = Late()

    async with (
        wire(late) as between,
        gateway(late, upstream=(between.url,), deadline_ms=60_000) as (address, *_),
    ):
        asked = asyncio.create_task(ask(address))
        await until(lambda: late.begun == 1)
        before = between.made
        await until(lambda: between.made >= before + 2)  # by probes
        late.go.set()
        assert (await asked).status == 200
        assert (late.begun, late.cancelled) == (1, 0)


async def test_what_is_asked_of_an_upstream_that_answers_no_probe_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "PROBE_PERIOD", 0.05)
    monkeypatch.setattr(roster, "PROBE_TIMEOUT", 0.2)
    late = Late()

    async with gateway(late, deadline_ms=60_000) as (address, *_):
        asked = asyncio.create_task(ask(address))
        await until(lambda: late.begun == 1)
        late.held.clear()
        before = late.probes
        await until(lambda: late.probes >= before + 3)
        late.held.set()
        late.go.set()
        assert (await asked).status == 200
        assert (late.begun, late.cancelled) == (1, 0)


async def test_what_a_removed_upstream_is_at_ends_by_itself() -> None:
    late, steady = Late(), Fake()

    await steady.start()
    async with gateway(late, policy="uncoded", deadline_ms=60_000) as (address, relay, _):
        asked = asyncio.create_task(ask(address))
        await until(lambda: late.begun == 1)
        relay.pool.change([steady.url], open_upstream)
        assert (await asked).status == 200
        assert len(steady.seen) == 1  # others are asked at once
        late.go.set()
        await until(lambda: late.answered + late.cancelled == 1)
        assert late.cancelled == 0
    await steady.stop()


@pytest.mark.parametrize("is_removed", [False, True])
async def test_a_gateway_that_stops_waits_for_what_upstreams_are_at(is_removed: bool) -> None:
    late, quick = Late(), Fake()

    options = {"policy": "replicate", "deadline_ms": 60_000}
    async with gateway(late, quick, **options) as (address, relay, _):
        assert (await ask(address)).status == 200
        await until(lambda: late.begun == 1)
        if is_removed:
            relay.pool.change([quick.url], open_upstream)
        asyncio.get_running_loop().call_later(2 * pool.LAST_WAIT, late.go.set)
    assert (late.answered, late.cancelled) == (1, 0)


async def test_a_gateway_that_stops_waits_no_longer_than_the_deadline() -> None:
    late, quick = Late(), Fake()

    options = {"policy": "replicate", "deadline_ms": 1000}
    async with gateway(late, quick, **options) as (address, *_):
        assert (await ask(address)).status == 200
        await until(lambda: late.begun == 1)
        began = time.monotonic()
    assert time.monotonic() - began < 30.0  # a call may take a minute


async def test_a_try_to_connect_takes_no_longer_than_it_may() -> None:
    """Of itself, gRPC tries for 20 s."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"grpc://127.0.0.1:{listening.getsockname()[1]}"
        upstream = open_upstream(url, connect=0.2)
        with pytest.raises(Unreachable) as error:
            await upstream.infer(Call("m", "", "grpc", b"", (), 0.0), 5.0)
        assert error.value.reply is not None  # no answer in time would be none
        assert error.value.reply.status == 14
        await upstream.close()


async def test_an_answer_may_be_so_large_and_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the upstream has failed."""
    monkeypatch.setattr(grpc_upstream, "LARGEST", 100_000)
    fake = GrpcFake()
    fake.answer.raw_output_contents[0] = bytes(90_000)
    await fake.start()
    upstream, call = open_upstream(fake.url), Call("m", "", "grpc", b"", (), 0.0)
    assert len((await upstream.infer(call, 5.0)).body) > 90_000
    fake.answer.raw_output_contents[0] = bytes(110_000)
    reply = await upstream.infer(call, 5.0)
    assert reply.fails
    assert "larger than max" in reply.message
    await upstream.close()
    await fake.stop()
