"""Connections to upstreams over gRPC: when they end, and when others take their place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from codedinvnet.serving.gateway import pool
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
    await until(lambda: late.cancelled == 1)
