"""What tasks of a service took, read from a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codedinvnet.errors import UserError

FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to tell whether it is slower than others."""
LONGEST = 86_400_000.0
"""Of a task, in ms."""
HEADER = "worker,ms"


@dataclass(frozen=True)
class WorkerTasks:
    """A worker's tasks.

    Attributes:
        name: as its service calls it.
        times: what they took, (n,) in ms.
    """

    name: str
    times: np.ndarray


def read_measured(path: Path) -> tuple[WorkerTasks, ...]:
    """Read a latency log: a CSV file with a line `worker,ms` for every task.

    Raises:
        UserError: if the file is no such log, or holds too few tasks.
    """
    found = _read_lines(path)
    count = sum(len(worker.times) for worker in found)
    if count < FEWEST_TASKS:
        raise UserError(f"{path}: {count} tasks are too few to fit: {FEWEST_TASKS} at least")
    times = np.concatenate([worker.times for worker in found])
    if not np.median(times):
        raise UserError(f"{path}: more than half of the tasks took 0 ms; times are in ms")
    if times.max() > LONGEST:
        raise UserError(f"{path}: a task took {times.max():g} ms, which is more than a day")
    return found


def _read_lines(path: Path) -> tuple[WorkerTasks, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    samples: dict[str, list[float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.replace(" ", "") == HEADER):
            continue
        worker, comma, text = line.partition(",")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not comma or not 0 <= value < math.inf:
            raise UserError(f"{path}, line {number}: {line!r} is not {HEADER}")
        samples.setdefault(worker.strip(), []).append(value)
    return tuple(WorkerTasks(name, np.array(times)) for name, times in samples.items())
