"""What tasks of a service took, read from a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from codedinvnet.config import Positive, Section, describe
from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.simulation.distributions import Distribution, Time

FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to tell whether it is slower than others."""
LONGEST = 86_400_000.0
"""Of a task, in ms."""
HEADER = "worker,ms"


class ServedTasks(Section):
    """What tasks of one worker took, as `GET /times` says it."""

    seen: Positive
    """How many it did."""
    ms: Annotated[tuple[Time, ...], Field(min_length=1)]
    """A sample of them, in any order."""


class ServedTimes(Section):
    """The answer of `GET /times`, as far as it is needed."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    tasks: Annotated[tuple[ServedTasks | None, ...], Field(min_length=1)]
    """Of each worker; None if it has done none."""
    encode: Distribution | None = None


@dataclass(frozen=True)
class WorkerTasks:
    """A worker's tasks.

    Attributes:
        name: as its service calls it.
        seen: how many it did.
        times: what a sample of them took, (n,) in ms.
    """

    name: str
    seen: int
    times: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What tasks took.

    Attributes:
        workers: those that did any.
        idle: how many did none.
        encode: encoding a parity query, for each image of its group, if it is known.
    """

    workers: tuple[WorkerTasks, ...]
    idle: int = 0
    encode: Distribution | None = None


def read_measured(path: Path) -> Measured:
    """Read what tasks took: the answer of `GET /times` (JSON), or lines of `worker,ms` (CSV).

    Raises:
        UserError: if the file is neither, or holds too few tasks.
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
    raw = read_json(path)
    try:
        served = ServedTimes.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            f"{path} is no answer of GET /times: {describe(error, ServedTimes, raw)}"
        ) from error
    workers = tuple(
        WorkerTasks(str(number), max(tasks.seen, len(tasks.ms)), np.array(tasks.ms))
        for number, tasks in enumerate(served.tasks)
        if tasks is not None
    )
    return Measured(workers, len(served.tasks) - len(workers), served.encode)


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
    return Measured(tuple(WorkerTasks(n, len(v), np.array(v)) for n, v in samples.items()))
