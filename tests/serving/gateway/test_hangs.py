"""Upstreams that do not answer within the limit: slow ones, busy ones, and those that hang."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from aiohttp import web

from codedinvnet.serving.gateway import pool, run
from tests.observing import until
from tests.serving.gateway.asking import ask, ask_until, is_up
from tests.serving.gateway.fakes import Fake, gateway

OPTIONS: dict[str, Any] = {"policy": "uncoded", "deadline_ms": 60_000, "hang_timeout_ms": 300}


class Serial(Fake):
    """Computes one request at a time, and counts those that it is at."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Semaphore(1)
        self.at = self.most = 0

    async def _infer(self, request: web.Request) -> web.Response:
        self.at += 1
        self.most = max(self.most, self.at)
        try:
            async with self.turn:
                return await super()._infer(request)
        finally:
            self.at -= 1


class Stuck(Fake):
    """Never answers its first request."""

    async def _infer(self, request: web.Request) -> web.Response:
        if not self.seen:
            self.seen.append((request.path, {}, b""))
            await asyncio.Event().wait()
        return await super()._infer(request)


async def test_what_takes_longer_than_the_limit_is_answered() -> None:
    async with gateway(one := Fake(), other := Fake(), **OPTIONS) as (address, relay, _):
        one.delay = other.delay = 0.9
        assert (await ask(address)).status == 200
        assert len(one.seen) == len(other.seen) == 1  # another is asked once
        assert is_up(relay) == [True, True]
    async with gateway(alone := Fake(), **OPTIONS) as (address, relay, _):
        alone.delay = 0.9
        replies = await asyncio.gather(*(ask(address) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert len(alone.seen) == 8
        assert is_up(relay) == [True]


async def test_a_deadline_may_be_longer_than_what_nobody_waits_for_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "LONGEST", 0.2)
    async with gateway(fake := Fake(), policy="uncoded", deadline_ms=60_000) as (address, *_):
        fake.delay = 0.6
        assert (await ask(address)).status == 200
        assert len(fake.seen) == 1


async def test_what_waits_its_turn_at_a_busy_upstream_is_not_asked_of_another() -> None:
    """Each request takes longer than the limit, since others are before it."""
    busy, requests = (Serial(), Serial()), 30

    async with gateway(*busy, slots=4, **OPTIONS) as (address, relay, _):
        for fake in busy:
            fake.delay = 0.1
        replies = await asyncio.gather(*(ask(address) for _ in range(requests)))
        assert [reply.status for reply in replies] == [200] * requests
        asked = sum(len(fake.seen) for fake in busy)
        assert asked <= requests + 5  # a machine that stands still may seem to be an upstream
        assert max(fake.most for fake in busy) <= 4 + asked - requests
        assert is_up(relay) == [True, True]


async def test_a_slot_stays_taken_after_the_deadline_of_what_is_computed() -> None:
    busy = Serial()

    async with gateway(busy, **{**OPTIONS, "deadline_ms": 2000, "slots": 1}) as (address, *_):
        busy.delay = 1.5
        first, second = await asyncio.gather(ask(address), ask(address))
        assert {first.status, second.status} == {200, 504}
        await ask(address)
        assert busy.most == 1


async def test_who_answers_nothing_is_set_aside_and_all_it_is_at_is_asked_elsewhere() -> None:
    good, wedged = Fake(), Fake()

    async with gateway(good, wedged, **OPTIONS) as (address, relay, _):
        wedged.hold()
        replies = await asyncio.gather(*(ask(address) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        await ask_until(lambda: relay.front.workers[1].deaths > 0, address)
        assert relay.front.workers[0].deaths == 0
        wedged.go()
        await until(lambda: is_up(relay) == [True, True])


async def test_a_request_that_is_stuck_is_asked_of_another() -> None:
    """Though its upstream answers those that came later."""
    good, stuck = Fake(), Stuck()

    async with gateway(good, stuck, slots=2, **OPTIONS) as (address, relay, _):
        replies = await asyncio.gather(*(ask(address) for _ in range(12)))
        assert [reply.status for reply in replies] == [200] * 12
        assert len(good.seen) + len(stuck.seen) == 13
        assert is_up(relay) == [True, True]


@pytest.mark.parametrize("slow", [0, 1])
async def test_an_answer_is_waited_for_while_another_upstream_is_asked(slow: int) -> None:
    fakes = Fake(), Fake()
    async with gateway(*fakes, **OPTIONS | {"policy": "replicate"}) as (address, *_):
        fakes[slow].delay, fakes[1 - slow].delay = 50.0, 1.0
        assert (await asyncio.wait_for(ask(address), 20.0)).status == 200
        assert [len(fake.seen) for fake in fakes] == [1, 1]


async def test_a_deadline_that_is_shorter_than_the_limit_ends_no_upstream_at_its_first_miss() -> (
    None
):
    slow, options = Fake(), {"policy": "uncoded", "deadline_ms": 200, "hang_timeout_ms": 60_000}
    async with gateway(slow, **options) as (address, relay, _):
        slow.delay = 0.6
        for _ in range(3):
            assert (await ask(address)).status == 504
            await asyncio.sleep(0.1)
        assert relay.front.workers[0].deaths == 0
        slow.delay = 0.0
        await asyncio.sleep(0.6)
        assert (await ask(address)).status == 200


async def test_whoever_finds_out_that_an_upstream_is_lost_it_is_set_aside(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the rules do, before the pool."""
    monkeypatch.setattr(run, "LAST_WORD", -0.4)
    caplog.set_level(logging.INFO, "codedinvnet.serving")
    options = {"deadline_ms": 300, "hang_timeout_ms": 60_000}

    async with gateway(fake := Fake(), **options) as (address, relay, _):
        fake.hold()
        assert (await ask(address)).status == 504
        await until(lambda: relay.front.workers[0].deaths == 1)
        await until(lambda: "upstream is back" in caplog.messages)
        assert "upstream set aside" in caplog.messages
        fake.go()
