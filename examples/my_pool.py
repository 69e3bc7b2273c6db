"""A worker pool of one's own: each worker is a thread of the front end's process.

codedinvnet serve model.onnx --pool examples/my_pool.py:Pool

A pool knows no coding. It runs numbered tasks on numbered workers, one at a time on each, and says
when a worker is lost. What a worker loads and computes, `spec.load()` and `run_task` know.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from codedinvnet.serving.workers.computing import WorkerSpec
from codedinvnet.serving.workers.pool import Task, WorkerFailed
from codedinvnet.serving.workers.result import Computer, Result, run_task


class Pool:
    """Threads, which share one copy of the model.

    Args:
        spec: what workers load.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.on_death: Callable[[int, str], None] | None = None  # threads do not die
        self.threads: list[ThreadPoolExecutor] = []
        self.computer: Computer | None = None

    async def start(self, size: int) -> None:
        """Load the model, and start that many threads."""
        self.computer = await asyncio.to_thread(self.spec.load)
        self.threads = [ThreadPoolExecutor(1) for _ in range(size)]

    async def call(self, worker: int, task: Task) -> Result:
        """Run a task on a worker."""
        loop = asyncio.get_running_loop()
        assert self.computer is not None
        try:
            return await loop.run_in_executor(
                self.threads[worker], run_task, self.computer, task.number, task.inputs
            )
        except Exception as error:
            raise WorkerFailed(f"{type(error).__name__}: {error}") from error

    async def replace(self, worker: int) -> None:
        """Leave a thread that hangs to itself, and start another."""
        self.threads[worker].shutdown(wait=False, cancel_futures=True)
        self.threads[worker] = ThreadPoolExecutor(1)

    async def stop(self) -> None:
        """End all threads."""
        for thread in self.threads:
            thread.shutdown(wait=False, cancel_futures=True)

    def pid(self, worker: int) -> int | None:
        """Return None: a thread has no process of its own."""
        return None
