"""What workers are at: a task, or several data tasks that are computed in one call."""

from __future__ import annotations

from typing import NamedTuple

from codedinvnet.serving.workers.pool import Task, WorkerFailed
from codedinvnet.serving.workers.result import Result


class Sent(NamedTuple):
    """A call of a worker."""

    worker: int
    task: Task
    """What the pool is given: several data tasks are one of as many queries."""
    members: tuple[int, ...]
    """The queries that it needs, fillers left out."""
    attempts: tuple[int, ...]
    began: float


def split(result: Result, tasks: int) -> list[Result]:
    """Return the results of the data tasks of a call.

    Raises:
        WorkerFailed: if its outputs are not of as many.
    """
    if tasks == 1:
        return [result]
    rows = {len(array) if array.ndim else 0 for array in result.outputs.values()}
    if rows != {tasks}:
        raise WorkerFailed(f"its outputs have {max(rows)} rows, not {tasks}")
    outputs = result.outputs.items()
    return [
        result._replace(outputs={name: array[i : i + 1] for name, array in outputs})
        for i in range(tasks)
    ]
