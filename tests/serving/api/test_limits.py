"""What a service cannot do, or not in time: every status, and what each says."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from codedinvnet.net import server
from codedinvnet.net.protocol import http as app
from codedinvnet.net.protocol.http import parse_request
from tests.clock import Clock
from tests.observing import until
from tests.serving.api.service import INFER, MAX_BODY, WORKERS, error, post, serving, tensor


class TestFailures:
    async def test_overloaded(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, max_pending=8) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            await until(lambda: len(service.front.scheduler.queries) == 8)
            response = await asyncio.wait_for(service.infer(images[:1]), 10)
            assert "overloaded" in error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            service.kill_all()
            assert (await first).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200

    async def test_who_finds_no_room_need_not_send_a_large_body(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        async with serving(mnist, max_pending=8) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:8]))
            await until(lambda: len(service.front.scheduler.queries) == 8)
            client = await service.connect(post(b"", MAX_BODY, "Expect: 100-continue"))
            assert (await client.answer()).startswith(b"HTTP/1.1 503 ")
            service.kill_all()
            assert (await first).status_code == 200

    async def test_bodies_that_arrive_have_a_limit(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            part = post(bytes(MAX_BODY - 1), MAX_BODY)
            halting = [await service.connect(part) for _ in range(8)]
            await until(lambda: service.memory.used == 8 * (MAX_BODY - 1))
            for size in (MAX_BODY, 100):
                refused = await service.connect(post(bytes(size)))
                head = await refused.answer()
                assert head.startswith(b"HTTP/1.1 503 ")
                assert b"Retry-After: 1\r\n" in head
            for client in halting:
                client.leave()
            await until(lambda: service.memory.used == 0)
            assert service.count(503) == 2

    async def test_images_that_wait_are_counted_with_bodies(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        large = np.full_like(images[:1], 200).repeat(24, 0)  # a body of 75 KB

        async with serving(mnist, body_memory=80000) as service:
            service.hang_all()
            first = asyncio.create_task(service.infer(images[:12]))
            await until(lambda: len(service.front.scheduler.queries) == 12)
            assert error(await service.infer(large), 503) == "memory is full: try again later"
            service.kill_all()
            assert (await first).status_code == 200
            assert (await service.infer(large)).status_code == 200
            assert service.memory.used == 0

    async def test_tensors_count_though_their_text_was_shorter(self, mnist: Bundle) -> None:
        data = tensor(np.zeros((8, 1, 28, 28), np.uint8), datatype="FP32")  # 12 KB, for 25
        async with serving(mnist, body_memory=99_000) as service:
            service.hang_all()

            def ask() -> asyncio.Task[Any]:
                return asyncio.create_task(service.client.post(INFER, json={"inputs": [data]}))

            queries, held = service.front.scheduler.queries, []
            for _ in range(3):
                held.append(ask())
                await until(lambda: len(queries) == 8 * len(held))
            assert "overloaded" in error(await asyncio.wait_for(ask(), 20.0), 503)
            service.kill_all()
            for one in held:
                assert (await one).status_code == 200
            assert service.memory.used == 0

    async def test_a_body_that_does_not_come(
        self, mnist: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "SWEEP", 0.05)
        async with serving(mnist, deadline=0.2) as service:
            client = await service.connect(post(b"{", 1000))
            head = await client.answer()
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"Connection: close\r\n" in head
            assert b"took too long" in await client.reader.read()
            assert service.count(408) == 1

    async def test_the_deadline_counts_from_the_requests_arrival(
        self, mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not from where it has been read."""
        clock = Clock()
        monkeypatch.setattr(time, "monotonic", clock)
        async with serving(mnist, deadline=1000.0) as service:

            def slowly(*words: Any) -> Any:
                clock.forward(160.0)
                return parse_request(*words)

            monkeypatch.setattr(app, "parse_request", slowly)
            service.hang_all()
            service.client.timeout = None  # its clock jumps as well
            late = asyncio.create_task(
                service.infer(
                    np.full_like(images[:1], 200).repeat(24, 0), parameters={"timeout": 180_000_000}
                )
            )
            await until(lambda: len(service.front.scheduler.queries) == 24, 200.0)
            await asyncio.sleep(0.1)
            assert not late.done()
            clock.forward(21.0)
            assert "deadline passed" in error(await asyncio.wait_for(late, 20.0), 504)

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
            assert service.count(500) == 1

    async def test_draining(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist) as service:
            await service.front.stop()
            response = await service.infer(images[:1])
            assert "shutting down" in error(response, 503)
            assert int(response.headers["retry-after"]) >= 1
            ready = await service.client.get("/v2/health/ready")
            assert (ready.status_code, ready.json()) == (503, {"ready": False})
            assert (await service.client.get("/v2/health/live")).status_code == 200

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
