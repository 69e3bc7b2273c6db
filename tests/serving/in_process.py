"""A pool of workers that are threads of this process."""

from __future__ import annotations

import asyncio

from codedinvnet.serving.workers.pool import (
    Computer,
    Death,
    Result,
    Task,
    WorkerDied,
    WorkerFailed,
    run_task,
)


class InProcessPool:
    """Workers that are threads of this process: they die and hang on request.

    Args:
        computer: what they compute with.
    """

    def __init__(self, computer: Computer) -> None:
        self.computer = computer
        self.on_death: Death | None = None
        self.dead: list[asyncio.Event] = []
        self.hung: list[asyncio.Event] = []
        self.calls: list[tuple[int, int]] = []
        """(worker, task number) of every call."""
        self.broken: set[int] = set()
        """Workers whose forward pass raises."""

    async def start(self, size: int) -> None:
        self.dead = [asyncio.Event() for _ in range(size)]
        self.hung = [asyncio.Event() for _ in range(size)]

    async def call(self, worker: int, task: Task) -> Result:
        self.calls.append((worker, task.number))
        if worker in self.broken:
            raise WorkerFailed("this worker is broken")
        dead = asyncio.create_task(self.dead[worker].wait())
        work = asyncio.create_task(self._work(worker, task))
        await asyncio.wait({dead, work}, return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()
        if not work.done() or self.dead[worker].is_set():
            work.cancel()
            raise WorkerDied("killed")
        return await work

    async def _work(self, worker: int, task: Task) -> Result:
        if self.hung[worker].is_set():
            await self.dead[worker].wait()
        return await asyncio.to_thread(run_task, self.computer, task.number, task.inputs)

    def kill(self, worker: int) -> None:
        """Let a worker die."""
        self.dead[worker].set()
        if self.on_death is not None:
            self.on_death(worker, "killed")

    def hang(self, worker: int) -> None:
        """Let a worker hang from its next task on."""
        self.hung[worker].set()

    async def replace(self, worker: int) -> None:
        self.dead[worker].set()
        await asyncio.sleep(0)
        self.dead[worker], self.hung[worker] = asyncio.Event(), asyncio.Event()
        self.broken.discard(worker)

    async def stop(self) -> None:
        for event in self.dead:
            event.set()
        await asyncio.sleep(0)

    def pid(self, worker: int) -> int | None:
        return None
