"""How a service is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from codedinvnet.serving import listening
from codedinvnet.serving.frontend import FrontEnd
from tests.observing import until


class Front:
    draining = stopped = False

    def announce_draining(self) -> None:
        self.draining = True


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["terminal", "nohup"])
def hangup(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What a hang-up does to a process when it starts."""
    before = signal.signal(signal.SIGHUP, request.param)
    yield request.param
    signal.signal(signal.SIGHUP, before)


async def test_a_terminal_that_ends_drains_a_service_unless_it_was_started_to_outlive_it(
    hangup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "freeze_loaded", lambda: None)
    front, lines = Front(), list[str]()

    @asynccontextmanager
    async def serving() -> AsyncIterator[tuple[str, FrontEnd]]:
        yield "http://here", cast(FrontEnd, front)
        front.stopped = True

    def line(address: str, _: FrontEnd) -> str:
        lines.append(address)
        return address

    told = asyncio.create_task(listening.until_told(serving(), line))
    await until(lambda: lines == ["http://here"])
    os.kill(os.getpid(), signal.SIGHUP)
    if hangup == signal.SIG_IGN:
        await asyncio.sleep(0.1)
        assert not front.draining
        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(told, 10)
    assert front.draining
    assert front.stopped
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.remove_signal_handler(number)
