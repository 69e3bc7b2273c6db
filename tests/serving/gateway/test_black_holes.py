"""Upstreams that are quick to do harm: one that has lost its model, and requests that kill."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import grpc
import pytest
from aiohttp import web

from codedinvnet.serving.gateway import places
from tests.observing import until
from tests.serving.gateway.asking import ask, ask_grpc, is_up, request
from tests.serving.gateway.fakes import ANSWER, Fake, GrpcFake, gateway

REQUESTS = "codedinvnet_requests_total"


async def test_one_that_has_lost_its_model_gets_no_more_requests() -> None:
    """Its refusals come at once, and would draw all of them."""
    sound, lost = Fake(), Fake()

    async with gateway(sound, lost) as (address, relay, _):
        assert (await ask(address)).status == 200
        sound.delay = 0.01
        lost.status, lost.body, lost.ready = 404, b'{"error":"unknown model"}', False
        replies = [await ask(address) for _ in range(20)]
        assert {reply.status for reply in replies} == {200}
        assert is_up(relay) == [True, False]
        lost.status, lost.body, lost.ready = 200, ANSWER, True
        await until(lambda: is_up(relay) == [True, True])


async def test_over_grpc_likewise() -> None:
    sound, lost = GrpcFake(), GrpcFake()

    async with gateway(sound, lost, grpc_port=0) as (_, relay, port):
        lost.code, lost.ready = grpc.StatusCode.NOT_FOUND, b""
        for _ in range(10):
            await ask_grpc(port, request(b"abc"))
        assert is_up(relay) == [True, False]


async def test_a_version_that_nobody_has_is_answered_so() -> None:
    """One that has the model all the same is asked whether it does once a second, not each time."""
    fakes = Fake(), Fake()

    async with gateway(*fakes) as (address, relay, _):
        for fake in fakes:
            fake.status, fake.body = 404, b'{"error":"no version 9"}'
        before = sum(fake.probes for fake in fakes)
        began = time.monotonic()
        for _ in range(20):
            assert (await ask(address)).status == 404
        passed = time.monotonic() - began
        assert is_up(relay) == [True, True]
        assert 1 <= sum(fake.probes for fake in fakes) - before <= 4 * (1 + passed)


async def test_the_last_one_that_is_up_is_believed() -> None:
    fake = Fake()

    async with gateway(fake) as (address, relay, _):
        fake.status, fake.ready = 404, False
        assert (await ask(address)).status == 404
        assert is_up(relay) == [True]


async def test_one_that_answers_nothing_but_errors_is_looked_at() -> None:
    """Some servers without their model say 400."""
    sound, lost = Fake(), Fake()

    async with gateway(sound, lost) as (address, relay, _):
        lost.status, lost.ready = 400, False

        async def on() -> None:
            while True:
                await ask(address)
                await asyncio.sleep(0.02)

        asking = asyncio.create_task(on())
        await until(lambda: is_up(relay) == [True, False])
        asking.cancel()


async def test_times_of_errors_are_not_those_of_answers() -> None:
    """Or most answers would be late, and nothing straggle, beside clients with bad requests."""
    fakes = Fake(), Fake()

    async with gateway(*fakes, slots=1) as (address, relay, _):

        async def asked(count: int, status: int, delay: float) -> None:
            for fake in fakes:
                fake.status, fake.delay = status, delay
            for _ in range(count):
                assert (await ask(address)).status == status

        pace = relay.front.scheduler.stats
        await asked(60, 400, 0.0)
        assert pace.normal == 0.0  # nothing is known
        await asked(30, 200, 0.05)
        before = pace.overhead
        await asked(30, 400, 0.0)
        assert pace.normal >= 0.05
        assert pace.overhead == before


class Mortal(Fake):
    """Hangs up on one request, as who dies by it; the others it answers."""

    stays_dead = False

    async def _infer(self, request: web.Request) -> web.Response:
        if request.path.endswith("/versions/13/infer") and request.transport is not None:
            self.deadly = getattr(self, "deadly", 0) + 1
            request.transport.abort()
            if self.stays_dead:
                self.dying = asyncio.create_task(self.stop())
        return await super()._infer(request)


@pytest.mark.parametrize("ready", [True, False])
async def test_what_kills_two_upstreams_is_sent_to_no_third(ready: bool) -> None:
    fakes = [Mortal() for _ in range(5)]

    async with gateway(*fakes) as (address, relay, _):
        counted = partial(relay.front.metrics.registry.get_sample_value, REQUESTS, {"code": "502"})
        for fake in fakes:
            fake.ready = ready
        assert counted() == 0  # and not missing: an alert on its increase would not see the first
        reply = await ask(address, path="/v2/models/m/versions/13/infer")
        assert (reply.status, counted()) == (502, 1)
        assert b"it hung up" in reply.body or b"broke" in reply.body
        assert sum(getattr(fake, "deadly", 0) for fake in fakes) <= 4  # each twice if it was kept
        assert sum(is_up(relay)) >= 3


@pytest.mark.parametrize("policy", ["uncoded", "hedge", "replicate"])
@pytest.mark.parametrize("kept", [True, False])
async def test_nor_is_what_kills_two_that_stay_dead(kept: bool, policy: str) -> None:
    """Over a connection that was kept, and is tried once more, or a fresh one; with copies, too."""
    fakes = [Mortal() for _ in range(5)]

    async with gateway(*fakes, policy=policy) as (address, relay, _):
        for _ in range(20 * kept):
            assert (await ask(address)).status == 200
        for fake in fakes:
            fake.stays_dead = True
        assert (await ask(address, path="/v2/models/m/versions/13/infer")).status == 502
        most = 3 if policy == "hedge" else 2  # two copies may have been sent before it kills
        died = sum(hasattr(fake, "deadly") for fake in fakes)
        assert 2 <= died <= most
        await until(lambda: sum(is_up(relay)) == 5 - died)
        assert (await ask(address)).status == 200


async def test_broken_connections_are_paid_for_as_other_failures_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Upstreams that shed load so would get each request several times."""
    monkeypatch.setattr(places, "MOST_RETRIES", 5.0)
    fakes = Fake(), Fake()

    async with gateway(*fakes, policy="uncoded") as (address, _, _):
        for fake in fakes:
            fake.hangs_up = True
        replies = [await ask(address) for _ in range(50)]
        assert {reply.status for reply in replies} == {502}
        seen = sum(len(fake.seen) for fake in fakes)
        assert 50 <= seen <= 2 * (50 + 5 + 0.1 * 60)  # each twice: a probe's connection is kept


@pytest.mark.parametrize("ready", [True, False])
async def test_over_grpc_they_are_likewise(ready: bool) -> None:
    class Dying(GrpcFake):
        async def _infer(self, message: bytes, context: Any) -> bytes:
            self.seen.append((message, {}, 0.0))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            return b""

    fakes = [Dying() for _ in range(5)]
    async with gateway(*fakes, grpc_port=0) as (_, _, port):
        for fake in fakes:
            fake.ready = fake.ready if ready else b""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask_grpc(port, request(b"abc"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert sum(len(fake.seen) for fake in fakes) == 2
