"""What tasks of a service took, read from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.simulation.traffic import check_rules, read_traffic

FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to tell whether it is slower than others."""
LONGEST = 86_400_000.0
"""Of a task, in ms."""
HEADER = "worker,ms"
LIMITS = {"slots", "group_timeout_ms", "hang_timeout_ms", "deadline_ms", "max_pending"}
"""Of a running service's settings those that a scenario without a base takes."""


@dataclass(frozen=True)
class WorkerTasks:
    """A worker's tasks.

    Attributes:
        name: as its service calls it.
        times: what they took, (n,) in ms.
    """

    name: str
    times: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What tasks took.

    Attributes:
        workers: those that did any.
        idle: how many did none.
        encode_share: what encoding a parity query takes for each image of its group, in service
            times, if it is known.
        limits: its slots, timeouts and the like, as a scenario names them, if they are known.
    """

    workers: tuple[WorkerTasks, ...]
    idle: int = 0
    encode_share: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """How many tasks a worker was at, at most; 1 if that is not known."""
        return int(self.limits.get("slots", 1))


def read_measured(path: Path) -> Measured:
    """Read what tasks took: the answer of `GET /traffic` (JSON), or lines of `worker,ms` (CSV).

    Raises:
        UserError: if the file is neither, holds too few tasks, or is of a service that no
            scenario repeats.
    """
    found = _read_lines(path) if path.suffix.lower() == ".csv" else _read_served(path)
    count = sum(len(worker.times) for worker in found.workers)
    if count < FEWEST_TASKS:
        raise UserError(f"{path}: {count} tasks are too few to fit: {FEWEST_TASKS} at least")
    times = np.concatenate([worker.times for worker in found.workers])
    if not np.median(times):
        raise UserError(f"{path}: more than half of the tasks took 0 ms; times are in ms")
    if times.max() > LONGEST:
        raise UserError(f"{path}: a task took {times.max():g} ms, which is more than a day")
    return found


def _read_served(path: Path) -> Measured:
    seen = read_traffic(read_json(path), path)
    try:
        check_rules("fit", seen.rules)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    samples: dict[int, list[float]] = {}
    for _, worker, members, occupied, held in (*seen.earlier, *seen.tasks):
        if not members:
            samples.setdefault(worker, []).append(occupied + held)
    workers = tuple(WorkerTasks(str(n), np.array(ms)) for n, ms in sorted(samples.items()))
    idle = max(0, seen.rules.workers - len(workers))
    return Measured(workers, idle, seen.encode_share, seen.rules.model_dump(include=LIMITS))


def _read_lines(path: Path) -> Measured:
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
    return Measured(tuple(WorkerTasks(n, np.array(v)) for n, v in samples.items()))
