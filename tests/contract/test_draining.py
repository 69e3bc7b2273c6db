"""What becomes of requests when the gateway is told to stop."""

from __future__ import annotations

import asyncio

import pytest

from codedinvnet.net.client import HttpClient, parse_origin
from tests.gateway.support import INFER, V2, Request, answer, gateway, until

pytestmark = pytest.mark.anyio


async def test_requests_under_way_are_answered_and_new_connections_refused() -> None:
    go = asyncio.Event()

    async def held(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await go.wait()
        return answer(request.body or b"ok")

    async with gateway(held, held) as g:
        kinds = [("POST", V2, INFER), ("POST", "/orders", b"1"), ("GET", "/", None)]
        asked = [asyncio.create_task(g.ask(*kind)) for kind in kinds]
        await until(lambda: sum(len(one.requests) for one in g.upstreams) >= len(kinds))
        stopping = asyncio.create_task(g.gateway.stop())
        await asyncio.sleep(0.1)
        late = HttpClient(parse_origin(g.gateway.url))
        with pytest.raises(ConnectionRefusedError):
            await late.ask("GET", "/", 2.0)
        late.close()
        assert not any(each.done() for each in asked)
        go.set()
        found = await asyncio.gather(*asked)
        assert {one.status for one in found} == {200}
        assert [one.body for one in found] == [INFER, b"1", b"ok"]
        assert {one.field("connection") for one in found} == {"close"}
        await asyncio.wait_for(stopping, 10.0)
