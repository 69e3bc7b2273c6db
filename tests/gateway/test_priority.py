"""Where all upstreams are busy, higher priorities come first, and low ones are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.routes import read_rule
from tests.gateway.support import Running, gateway
from tests.observing import until
from tests.upstream import Request, Upstream, answer, saying

ROUTES = "POST /chat priority=high", "POST /batch priority=low"


@asynccontextmanager
async def full(**options: Any) -> AsyncIterator[Any]:
    """A gateway before one server that is busy, what asks it, and what tells the server's order."""
    seen, go = list[int](), asyncio.Semaphore(0)

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        seen.append(int(request.body))
        await go.acquire()
        return answer(b"ok")

    async with gateway(serve, slots=1, route=ROUTES, deadline_ms=3.6e6, **options) as g:
        asked = [asyncio.create_task(g.ask("POST", "/any", b"0"))]
        await until(lambda: seen == [0])

        async def ask(path: str, **fields: str) -> None:
            name = str(len(asked)).encode()
            asked.append(asyncio.create_task(g.ask("POST", path, name, **fields)))
            await asyncio.sleep(0.02)

        async def order() -> list[int]:
            for _ in asked:
                go.release()
            assert {(await one).status for one in asked} == {200}
            return seen[1:]

        yield ask, order


async def test_routes_have_priorities() -> None:
    async with full() as (ask, order):
        for path in ("/batch", "/any", "/chat", "/batch", "/chat"):
            await ask(path)
        assert await order() == [3, 5, 2, 1, 4]


async def test_clients_may_step_back_and_not_push_forward() -> None:
    async with full() as (ask, order):
        for path, said in (("/any", "low"), ("/batch", "high"), ("/any", "high"), ("/any", "?")):
            await ask(path, x_priority=said)
        await ask("/chat", x_priority="normal")
        assert await order() == [3, 4, 5, 1, 2]


async def test_behind_a_proxy_of_the_operators_a_request_has_the_priority_that_it_states() -> None:
    async with full(trusted_hops=1) as (ask, order):
        for path, said in (("/any", "low"), ("/batch", "HIGH"), ("/any", "high"), ("/any", "?")):
            await ask(path, x_priority=said)
        assert await order() == [2, 3, 4, 1]


@pytest.mark.parametrize(("hops", "told"), [(0, "low"), (1, "high")])
async def test_upstreams_are_told_what_is_granted(hops: int, told: str) -> None:
    async with gateway(Upstream(), route=ROUTES, trusted_hops=hops) as g:
        await g.ask("POST", "/batch", b"x", x_priority="high")
        assert g.upstreams[0].requests[-1].fields["x-priority"] == told
        await g.ask("POST", "/batch", b"x")
        assert "x-priority" not in g.upstreams[0].requests[-1].fields


async def asked(g: Running, path: str, count: int) -> list[Any]:
    return await asyncio.gather(*(g.ask("POST", path, b"x") for _ in range(count)))


async def test_low_priority_is_refused_before_others_and_told_when_to_come_back() -> None:
    async with gateway(saying(after=0.05), slots=1, route=ROUTES, deadline_ms=4000.0) as g:
        await asked(g, "/any", 8)  # from which the gateway learns how much it can take
        low = asyncio.create_task(asked(g, "/batch", 100))
        await until(lambda: g.metric("requests_total", outcome="refused") > 20)
        others = await asked(g, "/any", 4) + await asked(g, "/chat", 4)
        assert [each.status for each in others] == [200] * 8
        found = await low
        refused = [each for each in found if each.status == 429]
        assert len(refused) > 20
        assert {each.status for each in found} == {200, 429}
        waits = [int(each.field("retry-after")) for each in refused]
        assert 2 <= max(waits) <= 60
        assert min(waits) < max(waits)  # the more are to come back, the later


async def test_what_waits_is_refused_once_higher_priorities_leave_it_no_time() -> None:
    async with gateway(saying(after=0.05), slots=1, route=ROUTES, deadline_ms=1500.0) as g:
        await asked(g, "/any", 8)
        low = [asyncio.create_task(g.ask("POST", "/batch", b"x")) for _ in range(5)]
        await until(lambda: g.metric("requests_total") > 0)
        stop = asyncio.Event()

        async def client() -> set[int]:
            found = set()
            while not stop.is_set():
                found.add((await g.ask("POST", "/chat", b"x")).status)
            return found

        clients = [asyncio.create_task(client()) for _ in range(25)]
        found = [await one for one in low]
        stop.set()
        assert [each.status for each in found].count(429) >= 3
        assert 504 not in [each.status for each in found]
        await asyncio.gather(*clients)


def test_a_priority_that_there_is_not() -> None:
    with pytest.raises(UserError, match="high, normal, low"):
        read_rule("POST /a priority=urgent", "--route")
