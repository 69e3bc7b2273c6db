"""Clients that go away before they are answered."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from codedinvnet.net.protocol import http as app
from codedinvnet.net.protocol.http import parse_request
from codedinvnet.serving.api import bodies
from tests.observing import counted, until
from tests.serving.api.service import K, asked, post, serving


async def test_queries_whose_client_has_left_are_cancelled(
    mnist: Bundle, images: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(mnist) as service:
        service.hang_all()
        half = await service.connect(post(b"{", 100))
        client = await service.connect(asked(images[: 2 * K]))
        await until(lambda: len(service.front.scheduler.queries) == 2 * K)
        half.leave()
        client.leave()
        await until(lambda: service.count(499) == 1)
        assert counted(service.front.metrics.queries.labels("cancelled")) == 2 * K
        assert not service.front.scheduler.queries
        assert service.memory.used == 0
    assert "internal error" not in caplog.text


async def test_what_is_large_is_not_parsed_for_who_has_left(
    mnist: Bundle, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
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
        large = asked(np.full_like(images[:1], 200).repeat(24, 0))
        first = await service.connect(large)
        await until(lambda: bool(parsed))
        second = await service.connect(large)
        await until(lambda: service.memory.used > 1.9 * len(large))  # it waits for its turn
        second.leave()
        await asyncio.sleep(0.4)
        go_on.set()
        assert (await first.answer()).startswith(b"HTTP/1.1 200 ")
        await until(lambda: service.count(499) == 1)
        assert len(parsed) == 1
