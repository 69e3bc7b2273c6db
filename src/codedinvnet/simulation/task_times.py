"""What tasks of a service took, read from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, ValidationError

from codedinvnet.config import Positive, Rate, Section, describe
from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.simulation.distributions import Time

FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to tell whether it is slower than others."""
LONGEST = 86_400_000.0
"""Of a task, in ms."""
HEADER = "worker,ms"


class SeenLimits(Section):
    """Of a running service's settings those that a scenario has, too. None: it does not say."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    workers: int
    slots: Positive | None = None
    group_timeout_ms: Rate | None = None
    hang_timeout_ms: Rate | None = None
    deadline_ms: Rate | None = None
    max_pending: Positive | None = None
    worker_batch: int = 1
    backups: int = 0
    """Workers that compute a small backup's tasks alone; `workers` are the others."""


class SeenTasks(Section):
    """The answer of `GET /traffic`, as far as it is needed."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    rules: SeenLimits
    encode_share: Time | None = None
    """None: it is not known, as of a gateway or of another code than a bundle's own."""
    tasks: tuple[tuple[float, int, int, Time, Time], ...]
    """When it began, its worker, members (0: a data task), occupied and held; times in ms."""
    earlier: tuple[tuple[float, int, int, Time, Time], ...] = ()
    """The newest data tasks of workers that have few among `tasks`: they are older than these."""


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


def check_rules(what: str, worker_batch: int, backups: int) -> None:
    """Refuse the traffic of a service whose tasks a scenario cannot repeat.

    Args:
        what: would be made of the traffic, for the message.
        worker_batch: queries that one call may compute.
        backups: workers that compute a small backup's tasks alone.

    Raises:
        UserError: if there are several queries, or any such worker.
    """
    if worker_batch > 1:
        raise UserError(f"no {what} with --worker-batch {worker_batch}: it knows no calls")
    if backups:
        raise UserError(f"no {what} where a small backup has workers of its own: none is simulated")


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
    raw = read_json(path)
    try:
        seen = SeenTasks.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            f"{path} is no answer of GET /traffic: {describe(error, SeenTasks, raw)}"
        ) from error
    rules = seen.rules
    try:
        check_rules("fit", rules.worker_batch, rules.backups)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    samples: dict[int, list[float]] = {}
    for _, worker, members, occupied, held in (*seen.earlier, *seen.tasks):
        if not members:
            samples.setdefault(worker, []).append(occupied + held)
    workers = tuple(WorkerTasks(str(n), np.array(ms)) for n, ms in sorted(samples.items()))
    idle = max(0, rules.workers - len(workers))
    limits = rules.model_dump(exclude={"workers", "worker_batch", "backups"}, exclude_none=True)
    return Measured(workers, idle, seen.encode_share, limits)


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
