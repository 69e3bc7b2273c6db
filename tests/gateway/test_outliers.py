"""What fails on routes that nobody named is ejected, and a broken request ejects nobody."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.support import Running, gateway
from tests.observing import until
from tests.upstream import Request, answer, saying

PATH = "/v1/chat/completions"


async def computes(request: Request, writer: asyncio.StreamWriter) -> bytes:
    """A broken request fails everywhere."""
    await asyncio.sleep(0.01)
    if request.fields.get("x-id") == "broken":
        return answer(b"your request kills me", 500)
    return answer(b"ok")


async def errors(g: Running, requests: int, at_once: int = 6, identity: str = "fine") -> int:
    """Send POSTs on a route that nobody named; return how many clients saw an error."""
    gate = asyncio.Semaphore(at_once)

    async def one() -> bool:
        async with gate:
            found = await g.ask("POST", PATH, b"{}", x_id=identity)
            return found.status != 200

    return sum(await asyncio.gather(*(one() for _ in range(requests))))


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_few_clients_see_the_errors_of_one_upstream_of_three(status: int) -> None:
    async with gateway(saying(b"no", status), computes, computes) as g:
        seen = await errors(g, 600)
        assert seen <= 36
        assert g.metric("requests_total", status=f"{status // 100}xx") == seen
        assert g.metric("requests_total", status="2xx") == 600 - seen
        assert g.metric("ejections_total", upstream=g.upstreams[0].url, cause="status") >= 1
        assert g.metric("upstream_up", upstream=g.upstreams[0].url) == 0


async def test_an_upstream_stays_away_for_as_long_as_it_asked() -> None:
    async with gateway(saying(b"no", 429, "Retry-After: 30\r\n"), computes, computes) as g:
        await errors(g, 100)
        got = len(g.upstreams[0].requests)
        await asyncio.sleep(1.5)  # without it, it would be back after a second
        assert await errors(g, 100) == 0
        assert len(g.upstreams[0].requests) == got


async def test_two_of_three_upstreams_are_ejected_and_the_last_never() -> None:
    async with gateway(*[saying(b"no", 500)] * 2, computes) as g:
        assert await errors(g, 600) <= 72
        for upstream in g.upstreams[:2]:
            assert g.metric("ejections_total", upstream=upstream.url, cause="status") >= 1
    async with gateway(*[saying(b"no", 500)] * 3) as g:
        assert await errors(g, 100) == 100
        assert g.metric("ejections_total", cause="status") == 0


async def test_requests_that_take_turns_meet_sound_upstreams_too() -> None:
    """Each second one may be repeated, so that all others could meet the failing upstream."""
    async with gateway(*[saying(b"no", 500)] * 2, computes) as g:
        statuses = []
        for number in range(200):
            method, body = ("GET", b"") if number % 2 else ("POST", b"{}")
            statuses.append((await g.ask(method, PATH, body)).status)
            await asyncio.sleep(0.015)  # nobody is busy when the next one comes
        assert sum(status != 200 for status in statuses) <= 36
        for upstream in g.upstreams[:2]:
            assert g.metric("ejections_total", upstream=upstream.url, cause="status") >= 1


async def test_a_client_with_broken_requests_ejects_nobody() -> None:
    async with gateway(computes, computes, computes) as g:
        broken, fine = await asyncio.gather(errors(g, 100, identity="broken"), errors(g, 300))
        assert (broken, fine) == (100, 0)
        assert g.metric("ejections_total", cause="status") == 0


async def test_an_upstream_that_is_sound_again_comes_back() -> None:
    sick = True

    async def recovers(request: Request, writer: asyncio.StreamWriter) -> bytes:
        return answer(b"no", 500) if sick else await computes(request, writer)

    async with gateway(recovers, computes) as g:
        await errors(g, 60)
        assert g.metric("upstream_up", upstream=g.upstreams[0].url) == 0
        sick = False
        await until(lambda: g.metric("upstream_up", upstream=g.upstreams[0].url) == 1)
        got = len(g.upstreams[0].requests)
        assert await errors(g, 60) == 0
        assert len(g.upstreams[0].requests) > got
