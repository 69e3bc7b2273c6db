"""How the upstreams are looked at that have not answered for a while."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from codedinvnet.serving.gateway import roster
from codedinvnet.serving.gateway.calls import Call, Reply
from codedinvnet.serving.gateway.roster import AT_ONCE, Roster
from codedinvnet.serving.gateway.upstream_metrics import UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import OwnHeaders
from codedinvnet.serving.metrics import Metrics
from tests.observing import until

TENSOR = {"name": "x", "datatype": "FP32", "shape": [-1, 1]}
MANY = 5 * AT_ONCE


class Steady:
    """An upstream that is ready, and remembers who was asked in the same turn of the loop."""

    tries, stops, translates = 1, False, False
    own = OwnHeaders()

    def __init__(self, url: str, asked: Counter[str], at_once: list[int]) -> None:
        self.url, self.asked, self.at_once = url, asked, at_once

    async def infer(self, call: Call, seconds: float) -> Reply:
        raise NotImplementedError

    async def is_ready(self, model: str, seconds: float) -> bool:
        self.asked[self.url] += 1
        self.at_once.append(self.at_once[-1] + 1)
        await asyncio.sleep(0)
        self.at_once.append(self.at_once[-1] - 1)
        return True

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        return {"name": model, "inputs": [TENSOR], "outputs": [TENSOR]}

    async def close(self, grace: float | None = 0.0) -> None:
        """There is nothing to close."""


async def test_many_are_not_asked_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request would wait until all are; but each is asked as often as the others."""
    monkeypatch.setattr(roster, "PROBE_PERIOD", 0.5)
    asked: Counter[str] = Counter()
    at_once = [0]
    upstreams = [Steady(f"http://{i}", asked, at_once) for i in range(MANY)]
    watched = Roster(upstreams, "m", UpstreamMetrics(Metrics().registry))

    await watched.start(1)
    try:
        await until(lambda: asked.total() >= 3 * MANY)
    finally:
        await watched.close()
    assert len(asked) == MANY
    assert max(asked.values()) - min(asked.values()) <= 1
    assert max(at_once) <= MANY // 2  # two groups, if the machine stood still meanwhile
