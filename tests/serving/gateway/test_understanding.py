"""What the gateway asks of upstreams itself."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.models.probe import probe
from codedinvnet.serving.gateway import understanding
from codedinvnet.serving.gateway.calls import Reply
from codedinvnet.serving.gateway.understanding import AskedModel, NoAnswer
from codedinvnet.serving.gateway.upstreams import OwnHeaders, Upstream
from tests.observing import until
from tests.serving.gateway.fakes import ANSWER

INPUT = TensorSpec("x", "FP32", (3,))
QUERY = {"x": np.zeros((1, 3), np.float32)}


class Silent:
    """An upstream that answers so many questions, and keeps to no time then."""

    url, own = "http://silent", OwnHeaders()

    def __init__(self, answers: int = 0) -> None:
        self.answers, self.asked, self.left = answers, 0, 0

    async def infer(self, *_: Any) -> Reply:
        self.asked += 1
        if self.asked <= self.answers:
            return Reply("http", 200, ANSWER)
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


def test_a_probe_asks_no_more_once_its_loop_ends() -> None:
    """Its own end is no sign that the model takes one query at a time."""
    upstream = Silent(answers=1)

    async def start() -> None:
        compute = asking(upstream).compute
        probing = asyncio.create_task(asyncio.to_thread(probe, compute, (INPUT,), None, "m"))
        await until(lambda: upstream.asked == 2)
        probing.cancel()

    asyncio.run(start())
    assert upstream.asked == 2
