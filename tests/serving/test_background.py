"""Background tasks end with their owner, and none fails unseen."""

from __future__ import annotations

import asyncio

import pytest

from codedinvnet.serving.background import Background


async def test_what_fails_is_logged_and_the_rest_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background, ended = Background(), asyncio.Event()

    async def fails() -> None:
        raise ZeroDivisionError("of ours")

    async def ends() -> None:
        await asyncio.sleep(0.01)
        ended.set()

    background.spawn(fails())
    background.spawn(ends())
    await ended.wait()
    (told,) = caplog.records
    assert told.message == "internal error"
    assert vars(told)["fields"] == {"reason": "ZeroDivisionError: of ours"}


async def test_all_of_it_ends_with_its_owner() -> None:
    background, before = Background(), asyncio.all_tasks()
    for _ in range(3):
        background.spawn(asyncio.sleep(60))
    assert len(asyncio.all_tasks() - before) == 3
    await background.stop()
    assert asyncio.all_tasks() == before
