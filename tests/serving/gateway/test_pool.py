"""The gateway before upstreams of this process: who is asked, and who is set aside."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest

from codedinvnet.scheduler.quantiles import FEWEST
from codedinvnet.serving import supervisor
from tests.observing import until
from tests.serving.gateway.asking import BODY, ask, ask_grpc, ask_until, is_up, request
from tests.serving.gateway.fakes import ANSWER, Fake, GrpcFake, gateway


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


async def test_one_that_is_away_for_good_is_told_of_by_its_name_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.01,))
    good, away = Fake(), Fake()

    def told(reason: str) -> int:
        found = [vars(r)["fields"] for r in caplog.records if r.message == "worker did not start"]
        return sum(reason in fields["reason"] for fields in found)

    async with gateway(good, away) as (_, relay, _):
        away.ready = False
        await until(lambda: is_up(relay) == [True, False])
        before = away.probes
        await until(lambda: away.probes > before + 20)
        assert told(f"{away.url}: it is not ready") == 1
        away.metadata, away.ready = {**away.metadata, "outputs": []}, True
        await until(lambda: told("have different models") == 1)


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


async def test_who_comes_back_is_no_sign_that_others_are_to_blame(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Or each would be set aside in turn, and what was lost with it asked again for nothing."""
    fakes = first, *others = [Fake() for _ in range(4)]

    async with gateway(*fakes, policy="uncoded", deadline_ms=60_000) as (address, relay, _):
        for fake in fakes:
            fake.status = 503
        for fake in others:
            fake.delay = 0.3
        asked = [asyncio.create_task(ask(address)) for _ in range(40)]
        await until(lambda: not is_up(relay)[0])  # it failed, and no other had
        first.ready = False
        await asyncio.gather(*asked)
        first.ready, first.delay = True, 0.3
        await until(lambda: is_up(relay) == [True] * 4)
        for fake in others:
            fake.delay = 0.0
        caplog.clear()
        before = sum(len(fake.seen) for fake in fakes)
        replies = await asyncio.gather(*(ask(address) for _ in range(100)))
        assert {reply.status for reply in replies} == {503}
        assert "upstream set aside" not in caplog.text
        assert sum(len(fake.seen) for fake in fakes) - before < 100 + 50 + 0.1 * 160


async def test_who_fails_at_once_does_not_draw_what_a_slow_one_answers() -> None:
    slow, bad = Fake(), Fake()

    options = {"policy": "uncoded", "slots": 256, "deadline_ms": 60_000}
    async with gateway(slow, bad, **options) as (address, _, _):
        slow.delay, bad.status = 2.0, 503
        asked = []
        for _ in range(200):
            asked.append(asyncio.create_task(ask(address)))
            await asyncio.sleep(0.01)
        assert {reply.status for reply in await asyncio.gather(*asked)} == {200}
        assert len(bad.seen) < 30


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
        assert relay.front.times.service.seen == 1  # what was stopped was not done
        await slow.stop()  # or the gateway would wait for what it is at


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
