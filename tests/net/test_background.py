"""Background tasks end with their owner, and none fails unseen."""

from __future__ import annotations

import asyncio
import threading

import pytest

from codedinvnet.net.background import Background, in_thread


async def test_what_fails_is_logged_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize("fails", [False, True])
async def test_a_turn_is_had_until_the_thread_has_ended_though_nobody_waits(fails: bool) -> None:
    begun, may_end, turn = threading.Event(), threading.Event(), asyncio.Semaphore(1)

    def work() -> int:
        begun.set()
        may_end.wait(30.0)
        return 1 // (not fails)

    async def in_turn() -> int:
        async with turn:
            return await in_thread(work)

    waits = asyncio.create_task(in_turn())
    await asyncio.to_thread(begun.wait, 30.0)
    waits.cancel()
    await asyncio.sleep(0.05)
    assert turn.locked()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert not turn.locked()
