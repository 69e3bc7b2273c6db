"""What `--route` says of requests' times, and deadlines that clients state."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from tests.gateway.support import INFER, V2, gateway
from tests.upstream import Request, Upstream, saying

SLOW, FAST = "POST /slow deadline=2s", "* /fast* deadline=200ms"


async def test_each_route_has_a_deadline_of_its_own() -> None:
    async with gateway(saying(after=0.7), deadline_ms=400.0, route=(SLOW, FAST)) as g:
        paths = ("/slow", "/fast/x", "/other")
        found = await asyncio.gather(*(g.ask("POST", path, b"x") for path in paths))
        waited = {path: g.metric("requests_total", route=path) for path in paths}
        shown = {route.name: route.is_repeatable for route in g.gateway.routes.all()}

    assert [one.status for one in found] == [200, 504, 504]
    assert shown == {"POST /slow": False, "* /fast*": False, "other": False}
    assert not any(waited.values())


async def test_a_rule_without_hedge_leaves_it_as_it_is() -> None:
    own = ("GET /big/* deadline=9s", "GET /pay hedge=off", "* /pay hedge=on", "POST /v2/* idle=1s")
    async with gateway(Upstream(), route=own) as g:
        for method, path in (("GET", "/big/1"), ("GET", "/pay"), ("POST", "/pay"), ("POST", V2)):
            await g.ask(method, path, INFER if method == "POST" else None)
        routes = g.gateway.routes.all()
    found = {one.name: (one.is_repeatable, one.limits.deadline) for one in routes}
    assert found == {
        "GET /big/*": (True, 9.0), "GET /pay": (False, 5.0), "* /pay": (True, 5.0),
        f"POST {V2}": (True, 5.0),
    }  # fmt: skip


async def test_a_stream_that_stands_still_ends_when_its_route_says_so() -> None:
    async def stall(request: Request, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        writer.write(head + b'data: {"choices":[{"text":"a"}]}\n\n')
        await asyncio.sleep(60.0)

    async with gateway(stall, route=("POST /chat idle=500ms",)) as g:
        asked = b"POST /chat HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
        found = await g.raw(asked, closes=False)
        assert b'"text":"a"' in found
        assert not found.endswith(b"0\r\n\r\n")  # it is not complete
        assert g.metric("requests_total", outcome="aborted") == 1
        assert g.metric("in_flight") == 0


@pytest.mark.parametrize(
    ("name", "said", "unit"),
    [("x-request-timeout", "0.6", 1.0), ("x-envoy-upstream-rq-timeout-ms", "600", 0.001)],
)
async def test_a_deadline_of_the_client_holds_and_upstreams_know_what_is_left(
    name: str, said: str, unit: float
) -> None:
    async with gateway(saying(after=2.0), slots=1) as g:
        before = time.monotonic()
        asked = (g.client.ask("GET", "/", 5.0, None, [(name, said)]) for _ in range(2))
        found = await asyncio.gather(*asked)
        assert time.monotonic() - before < 2.0
        (first,) = g.upstreams[0].requests
    assert [one.status for one in found] == [504, 504]
    assert 0.3 < float(first.fields[name]) * unit <= 0.6
    assert first.head.lower().count(name.encode()) == 1


@pytest.mark.parametrize("said", ["0", "-1", "x", "9" * 40, "60"])
async def test_no_client_waits_longer_than_the_operator_says(said: str) -> None:
    async with gateway(saying(after=2.0), deadline_ms=300.0) as g:
        found = await g.ask("GET", "/", x_request_timeout=said)
        (sent,) = g.upstreams[0].requests
    assert found.status == 504
    passed_on = sent.fields["x-request-timeout"]
    assert float(passed_on) > 59 if said == "60" else passed_on == said


async def test_an_overload_of_all_upstreams_is_not_multiplied() -> None:
    """Each is asked once at most, and no more again than the budget of retries pays for."""

    overloaded = saying(b"busy", 429)
    async with gateway(*[overloaded] * 3) as g:
        for number in range(60):
            assert (await g.ask("GET", f"/{number}", x_id=str(number))).status == 429
        seen = [upstream.seen for upstream in g.upstreams]
        sent = g.metric("retries_total", result="sent")
    assert max(max(each.values()) for each in seen) == 1
    assert sum(each.total() for each in seen) == 60 + sent
    assert sent <= math.ceil(50 + 60 / 10)
    async with gateway(*[overloaded] * 3) as g:  # what one has shed is not sent to who sheds too
        asked = (g.ask("GET", f"/{number}") for number in range(40))
        assert {reply.status for reply in await asyncio.gather(*asked)} == {429}
        assert sum(upstream.seen.total() for upstream in g.upstreams) <= 44
