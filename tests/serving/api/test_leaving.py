"""Clients that go away before they are answered."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from codedinvnet.protocol import http as app
from codedinvnet.protocol.http import parse_request
from codedinvnet.serving.api import bodies
from tests.observing import counted
from tests.serving.api.service import (
    K,
    Leaving,
    scope,
    serving,
)


async def test_a_client_that_goes_away_is_no_fault_of_ours(
    mnist: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(mnist) as service:
        transport = service.client._transport
        assert isinstance(transport, httpx.ASGITransport)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        await transport.app(scope((b"content-length", b"100")), receive, send)
    assert "internal error" not in caplog.text


class TestLeaving:
    async def test_queries_that_nobody_waits_for_are_cancelled(
        self, mnist: Bundle, images: np.ndarray, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving(mnist) as service:
            service.hang_all()
            client = Leaving(service, images[: 2 * K])
            request = asyncio.create_task(client.infer())
            while len(service.front.scheduler.queries) < 2 * K:
                await asyncio.sleep(0.005)
            client.away.set()
            await asyncio.wait_for(request, 30)
            assert client.sent[0]["status"] == 499
            state = (await service.client.get("/page/state")).json()
            assert state["answers"]["cancelled"] == 2 * K
            assert not service.front.scheduler.queries
        assert "internal error" not in caplog.text

    async def test_one_that_stays_is_answered(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            client = Leaving(service, images[:K])
            await asyncio.wait_for(client.infer(), 30)
            assert client.sent[0]["status"] == 200
            await asyncio.sleep(0)
            assert not client.watched
            assert counted(service.front.metrics.queries.labels("cancelled")) == 0

    async def test_what_is_large_is_not_parsed_for_who_has_left(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parsed: list[int] = []
        go_on = threading.Event()
        monkeypatch.setattr(bodies, "LARGE_TURNS", 1)

        def slowly(*words: Any) -> Any:
            parsed.append(1)
            assert go_on.wait(30)
            return parse_request(*words)

        async with serving(mnist) as service:
            monkeypatch.setattr(app, "parse_request", slowly)
            large = np.full_like(images[:1], 200).repeat(24, 0)
            first, second = Leaving(service, large), Leaving(service, large)
            requests = [asyncio.create_task(first.infer())]
            while not parsed:
                await asyncio.sleep(0.005)
            requests.append(asyncio.create_task(second.infer()))
            await asyncio.sleep(0.05)  # it waits for its turn
            second.away.set()
            await asyncio.sleep(0.05)
            go_on.set()
            await asyncio.wait_for(asyncio.gather(*requests), 30)
            assert [client.sent[0]["status"] for client in (first, second)] == [200, 499]
            assert len(parsed) == 1
