"""What a service cannot do, or not in time: every status, and what each says."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from codedinvnet.protocol import http as app
from codedinvnet.protocol.http import parse_request
from tests.serving.api.service import (
    MAX_BODY,
    WORKERS,
    Leaving,
    Service,
    error,
    serving,
)


class TestFailures:
    async def test_overloaded(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, max_pending=8) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            while len(service.front.scheduler.queries) < 8:
                await asyncio.sleep(0.005)
            response = await asyncio.wait_for(service.infer(images[:1]), 10)
            assert "overloaded" in error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            service.kill_all()
            assert (await first).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200

    async def test_what_is_large_is_not_parsed_for_nothing(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(mnist, max_pending=8) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            while len(service.front.scheduler.queries) < 8:
                await asyncio.sleep(0.005)
            monkeypatch.setattr(app, "parse_request", None)
            assert "overloaded" in error(
                await service.infer(np.full_like(images[:1], 200).repeat(24, 0)), 503
            )
            monkeypatch.undo()
            service.kill_all()
            assert (await first).status_code == 200

    async def test_who_finds_no_room_need_not_send_the_body(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        class Unread(Leaving):
            async def receive(self) -> dict[str, Any]:
                raise AssertionError("its body was read")

        async with serving(mnist, max_pending=8) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            while len(service.front.scheduler.queries) < 8:
                await asyncio.sleep(0.005)
            client = Unread(service, images[:1])
            await asyncio.wait_for(client.infer(), 30)
            assert client.sent[0]["status"] == 503
            service.kill_all()
            assert (await first).status_code == 200

    async def test_bodies_that_arrive_have_a_limit(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Halting(Leaving):
            """Sends all but the end of a body, and then waits."""

            def __init__(
                self, service: Service, images: np.ndarray, length: int = MAX_BODY
            ) -> None:
                super().__init__(service, images)
                self.length = length

            async def receive(self) -> dict[str, Any]:
                self._asked += 1
                if self._asked > 1:
                    await self.away.wait()
                    return {"type": "http.disconnect"}
                return {"type": "http.request", "body": bytes(self.length), "more_body": True}

        async with serving(mnist) as service:
            halting = [Halting(service, images[:1]) for _ in range(8)]
            requests = [asyncio.create_task(client.infer()) for client in halting]
            await asyncio.sleep(0.05)
            one_more = Halting(service, images[:1])
            await asyncio.wait_for(one_more.infer(), 30)
            assert one_more.sent[0]["status"] == 503
            small = Halting(service, images[:1], 100)
            await asyncio.wait_for(small.infer(), 30)
            assert small.sent[0]["status"] == 503
            for client in halting:
                client.away.set()
            await asyncio.wait_for(asyncio.gather(*requests), 30)
            assert {client.sent[0]["status"] for client in halting} == {499}
            again = Halting(service, images[:1])
            again.away.set()
            await asyncio.wait_for(again.infer(), 30)
            assert again.sent[0]["status"] == 499
            count = service.front.metrics.registry.get_sample_value
            assert count("codedinvnet_requests_total", {"code": "503"}) == 2
            assert count("codedinvnet_requests_total", {"code": "499"}) == len(halting) + 1

    async def test_images_that_wait_are_counted_with_bodies(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        large = np.full_like(images[:1], 200).repeat(24, 0)  # a body of 75 KB

        async with serving(mnist, body_memory=80000) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:12]))
            while len(service.front.scheduler.queries) < 12:
                await asyncio.sleep(0.005)
            assert "overloaded" in error(await service.infer(large), 503)
            service.kill_all()
            assert (await first).status_code == 200
            assert (await service.infer(large)).status_code == 200

    async def test_a_body_that_does_not_come(self, mnist: Bundle, images: np.ndarray) -> None:
        class Silent(Leaving):
            async def receive(self) -> dict[str, Any]:
                if self._asked:
                    await self.away.wait()
                self._asked += 1
                return {"type": "http.request", "body": self.body[:100], "more_body": True}

        async with serving(mnist, deadline=0.2) as service:
            client = Silent(service, images[:1])
            began = time.monotonic()
            await asyncio.wait_for(client.infer(), 30)
            assert 0.2 <= time.monotonic() - began < 20
            start, content = client.sent[0], client.sent[1]["body"]
            assert start["status"] == 408
            assert (b"connection", b"close") in start["headers"]
            assert json.loads(content) == {"error": "body: not here after 0.2 s"}

    async def test_the_deadline_counts_from_the_requests_arrival(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(mnist) as service:

            def slowly(*words: Any) -> Any:
                time.sleep(1.6)
                return parse_request(*words)

            monkeypatch.setattr(app, "parse_request", slowly)
            service.hang_all()
            late = service.infer(
                np.full_like(images[:1], 200).repeat(24, 0), parameters={"timeout": 1_800_000}
            )
            began = time.monotonic()
            assert "deadline passed" in error(await late, 504)
            assert 1.8 <= time.monotonic() - began < 3.4  # not from where it has been read

    async def test_our_own_mistake(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(mnist) as service:

            async def broken(*_: Any, **__: Any) -> None:
                raise ZeroDivisionError("a detail that is not for clients")

            monkeypatch.setattr(service.front, "infer", broken)
            assert (
                error(await service.infer(images[:1]), 500) == "internal error: ZeroDivisionError"
            )
            count = service.front.metrics.registry.get_sample_value
            assert count("codedinvnet_requests_total", {"code": "500"}) == 1

    async def test_draining(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            await service.front.stop()
            response = await service.infer(images[:1])
            assert "shutting down" in error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            ready = await service.client.get("/v2/health/ready")
            assert (ready.status_code, ready.json()) == (503, {"ready": False})
            assert (await service.client.get("/v2/health/live")).status_code == 200

    async def test_deadline(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            service.hang_all()
            message = error(await service.infer(images[:3], parameters={"timeout": 200_000}), 504)
            assert message.startswith("3 of 3 queries: deadline passed; at worker ")

    async def test_workers_that_fail(
        self, mnist: Bundle, images: np.ndarray, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving(mnist) as service:
            service.pool.broken = set(range(WORKERS))
            message = error(await service.infer(images[:2], id="seven" * 100), 500)
            told = [vars(r)["fields"] for r in caplog.records if r.message == "query failed"]
            assert [fields["id"] for fields in told] == ["seven" * 20]
            assert message.startswith("2 of 2 queries failed: ")
            assert "this worker is broken" in message
            service.pool.broken = set()
            assert (await service.infer(images[:2])).status_code == 200
