"""What the gateway asks of upstreams itself."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn, cast

import numpy as np
import pytest

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.serving.gateway import understanding
from codedinvnet.serving.gateway.understanding import AskedModel, NoAnswer
from codedinvnet.serving.gateway.upstreams import Upstream
from tests.observing import until

INPUT = TensorSpec("x", "FP32", (3,))
QUERY = {"x": np.zeros((1, 3), np.float32)}


class Silent:
    """An upstream that keeps to no time."""

    url = "http://silent"

    def __init__(self) -> None:
        self.asked, self.left = 0, 0

    async def infer(self, *_: Any) -> NoReturn:
        self.asked += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1
        raise AssertionError


def asking(upstream: Silent) -> AskedModel:
    return AskedModel([cast(Upstream, upstream)], "m", Signature((INPUT,), ()), "--upstream")


async def test_a_thread_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(understanding, "TIMEOUT", 0.1)
    monkeypatch.setattr(understanding, "LEEWAY", 0.1)
    upstream = Silent()

    with pytest.raises(NoAnswer, match=r"--upstream: none answers in 0\.2 s"):
        await asyncio.wait_for(asyncio.to_thread(asking(upstream).compute, QUERY), 30)
    await until(lambda: upstream.left == 1)
