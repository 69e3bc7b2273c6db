"""Clients that go away before they are answered."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
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
