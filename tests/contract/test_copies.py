"""What upstreams are sent more than once: never more than is promised, nor at others' cost."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.support import INFER, V2, gateway
from tests.upstream import Request, Upstream, answer, saying


async def dying(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
    """Close the connection over `/poison`, and answer other requests."""
    return None if request.path == "/poison" else answer()


async def test_clients_errors_leave_others_their_retries() -> None:
    """Sixty requests for a model that no upstream has."""

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if request.path != "/fails-once":
            return answer(status=404 if request.path == "/v2/models/none/infer" else 200)
        seen = sum(one.seen[request.fields["x-id"]] for one in upstreams)
        return answer(status=500 if seen == 1 else 200)

    upstreams = [Upstream(serve), Upstream(serve)]
    async with gateway(*upstreams) as g:
        for _ in range(60):
            assert (await g.ask("POST", "/v2/models/none/infer", INFER)).status == 404
        for number in range(20):
            await asyncio.gather(g.ask("GET", "/"), g.ask("GET", "/"))  # neither is ejected
            assert (await g.ask("GET", "/fails-once", x_id=str(number))).status == 200


@pytest.mark.parametrize("policy", ["hedge", "replicate"])
async def test_a_single_upstream_gets_no_copies(policy: str) -> None:
    upstream = Upstream(saying(after=0.1))
    async with gateway(upstream, policy=policy, hedge_delay_ms="1:20") as g:
        for _ in range(10):
            for found in await asyncio.gather(*(g.ask("GET", "/") for _ in range(4))):
                assert found.status == 200
    assert len(upstream.requests) == 40


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_request_that_kills_its_upstream_is_sent_twice_at_most(count: int) -> None:
    """Also where it goes out on kept connections, which servers close at any time."""
    upstreams = [Upstream(dying) for _ in range(count)]
    async with gateway(*upstreams) as g:
        for _ in range(4):
            await asyncio.gather(*(g.ask("GET", "/") for _ in range(4 * count)))
        assert (await g.ask("GET", "/poison")).status == 502
    assert sum(r.path == "/poison" for one in upstreams for r in one.requests) == 2


async def test_slow_answers_share_a_connection() -> None:
    """Answers over 0.9 s are an everyday matter on any other route than V2's."""
    accepted: set[asyncio.StreamWriter] = set()

    async def slow(request: Request, writer: asyncio.StreamWriter) -> bytes:
        accepted.add(writer)
        await asyncio.sleep(1.05)
        return answer()

    async with gateway(Upstream(slow)) as g:
        for method in ("GET", "POST", "GET"):
            assert (await g.ask(method, "/v1/completions", b"{}")).status == 200
    assert len(accepted) == 1


@pytest.mark.parametrize(("path", "sent"), [(V2, 2), ("/orders", 1)])
async def test_a_closed_connection_costs_a_safe_request_nothing(path: str, sent: int) -> None:
    """One that must not be repeated fails, as its upstream may have had it."""
    closes: list[bool] = []

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        return None if closes and closes.pop() else answer()

    upstream = Upstream(serve)
    async with gateway(upstream) as g:
        assert (await g.ask("POST", path, INFER)).status == 200
        closes.append(True)
        assert (await g.ask("POST", path, INFER)).status == (200 if sent == 2 else 502)
        assert sent == 2 or g.metric("retries_total") == 0, "nor does it take others' retries"
    assert len(upstream.requests) == 1 + sent


async def test_copies_are_few_however_many_requests_are_late() -> None:
    """They may take a tenth of the work, and one that is cut short takes less than a request."""
    upstreams = [Upstream(saying(after=0.05)) for _ in range(3)]
    async with gateway(*upstreams, hedge_delay_ms="1:5") as g:
        for sent in range(20, 301, 20):
            await asyncio.gather(*(g.ask("GET", "/") for _ in range(20)))
            copies = sum(len(one.requests) for one in upstreams) - sent
            assert copies <= 2 + sent / 5
        assert copies >= 10  # they aren't just missing
