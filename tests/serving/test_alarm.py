"""What is overdue waits for answers that came while the event loop stood still."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import uvloop

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.settings import Rules
from codedinvnet.serving.answers import Answered
from codedinvnet.serving.dispatch import Dispatcher, Timing
from codedinvnet.serving.served import OwnModel, TensorCodec
from codedinvnet.serving.workers.pool import Death, Result, Task

WORKERS = 4
MODEL = OwnModel("m", Signature((TensorSpec("x", "FP32", (1,)),), (TensorSpec("y", "FP32", (1,)),)))
QUERY = {"x": np.zeros((1, 1), np.float32)}
RUNNERS = pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])


class Sockets:
    """A pool whose workers answer when a test says so."""

    def __init__(self) -> None:
        self.on_death: Death | None = None
        self.workers: list[socket.socket] = []
        self.answers: list[asyncio.Future[None]] = []
        self.listeners: list[asyncio.Task[None]] = []

    async def start(self, size: int) -> None:
        for worker in range(size):
            ours, theirs = socket.socketpair()
            self.workers.append(theirs)
            self.answers.append(asyncio.get_running_loop().create_future())
            self.listeners.append(asyncio.create_task(self._listen(worker, ours)))

    async def _listen(self, worker: int, ours: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=ours)
        while await reader.read(1):
            time.sleep(0.01)  # it takes in a large answer
            self.answers[worker].set_result(None)
        writer.close()

    async def call(self, worker: int, task: Task) -> Result:
        await self.answers[worker]
        return Result({"y": np.zeros((1, 1), np.float32)}, 0.01)

    async def replace(self, worker: int) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        for worker in self.workers:
            worker.close()
        await asyncio.gather(*self.listeners)

    def pid(self, worker: int) -> int | None:
        return None


@RUNNERS
def test_answers_that_take_long_to_read_come_from_no_hung_workers(
    runner: Callable[[Any], None],
) -> None:
    async def run() -> None:
        pool = Sockets()
        rules = Rules(WORKERS, POLICIES["uncoded"], hang_timeout=0.6)
        front = Dispatcher(pool, rules, TensorCodec(MODEL), timing=Timing(60.0))
        await front.start()
        asked = asyncio.create_task(front.infer([QUERY] * WORKERS))
        while sum(map(front.scheduler.load, range(WORKERS))) < WORKERS:
            await asyncio.sleep(0.01)
        for worker in pool.workers:
            worker.send(b"y")
        time.sleep(1.3)  # longer than a worker may be silent
        found = await asyncio.wait_for(asked, 30)
        assert all(isinstance(answer, Answered) for answer in found)
        assert [(view.state, view.deaths) for view in front.supervisor.workers] == [
            ("up", 0)
        ] * WORKERS
        await front.stop()

    runner(run())
