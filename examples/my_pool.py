"""A worker pool of one's own: each worker is a thread of the front end's process.

codedinvnet serve model.onnx --pool examples/my_pool.py:Pool

A pool knows no coding. It runs numbered tasks on numbered workers, one at a time on each, and says
when a worker is lost. What a worker loads and computes, `spec.load()` and `run_task` know.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeAlias

from codedinvnet.serving.workers.computing import WorkerSpec
from codedinvnet.serving.workers.pool import Computer, Result, Task, WorkerFailed, run_task

Job: TypeAlias = tuple[Task, "Future[Result]"]


class Pool:
    """Threads, which share one copy of the model.

    Args:
        spec: what workers load.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.on_death: Callable[[int, str], None] | None = None  # threads do not die
        self.queues: list[SimpleQueue[Job | None]] = []
        self.computer: Computer | None = None

    async def start(self, size: int) -> None:
        """Load the model, and start that many threads."""
        self.computer = await asyncio.to_thread(self.spec.load)
        self.queues = [self.new_thread() for _ in range(size)]

    def new_thread(self) -> "SimpleQueue[Job | None]":
        """Start a thread; return where it takes its tasks from, until it gets None."""
        queue: SimpleQueue[Job | None] = SimpleQueue()
        # A daemon: the process ends, though a thread may hang.
        threading.Thread(target=self.work, args=(queue,), daemon=True).start()
        return queue

    def work(self, queue: "SimpleQueue[Job | None]") -> None:
        """Run tasks, one at a time; in a thread."""
        assert self.computer is not None
        while (job := queue.get()) is not None:
            task, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(run_task(self.computer, task.number, task.inputs))
                except BaseException as error:  # the thread goes on
                    future.set_exception(error)

    async def call(self, worker: int, task: Task) -> Result:
        """Run a task on a worker."""
        future: Future[Result] = Future()
        self.queues[worker].put((task, future))
        try:
            return await asyncio.wrap_future(future)
        except (asyncio.CancelledError, WorkerFailed):  # an input that the model refuses
            raise
        except BaseException as error:
            raise WorkerFailed(f"{type(error).__name__}: {error}") from error

    async def replace(self, worker: int) -> None:
        """Leave a thread that hangs to itself, and start another."""
        self.queues[worker].put(None)
        self.queues[worker] = self.new_thread()

    async def stop(self) -> None:
        """End all threads."""
        for queue in self.queues:
            queue.put(None)

    def pid(self, worker: int) -> int | None:
        """Return None: a thread has no process of its own."""
        return None
