"""What tasks of a service took, read from a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from codedinvnet.config import Positive, Section, describe
from codedinvnet.errors import UserError
from codedinvnet.json_files import read_json
from codedinvnet.simulation.distributions import Distribution

FEWEST_TASKS = 100
"""Of all workers, to fit anything; of one, to tell whether it is slower than others."""
SAMPLE = 100_000
"""Tasks of all workers that are looked at."""
HEADER = "worker,ms"


class WorkerTimes(Section):
    """What tasks of one worker took, as `GET /times` says it."""

    seen: Positive
    times: Distribution

    @model_validator(mode="after")
    def _measured(self) -> WorkerTimes:
        if self.times.distribution != "empirical":
            raise ValueError("times must be an empirical distribution")
        return self


class ServedTimes(Section):
    """The answer of `GET /times`, as far as it is needed."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    tasks: Annotated[tuple[WorkerTimes | None, ...], Field(min_length=1)]
    """Of each worker; None if it has done none."""
    encode: Distribution | None = None


@dataclass(frozen=True)
class Measured:
    """Times of tasks.

    Attributes:
        workers: of each its sample (n,), in ms; empty if it has done none.
        encode: encoding a parity query, for each image of its group, if it is known.
    """

    workers: tuple[np.ndarray, ...]
    encode: Distribution | None = None


def read_measured(path: Path) -> Measured:
    """Read what tasks took: the answer of `GET /times` (JSON), or lines of `worker,ms` (CSV).

    Raises:
        UserError: if the file is neither, or holds too few tasks.
    """
    found = _read_lines(path) if path.suffix == ".csv" else _read_served(path)
    count = sum(map(len, found.workers))
    if count < FEWEST_TASKS:
        raise UserError(f"{path}: {count} tasks are too few to fit: {FEWEST_TASKS} at least")
    return found


def _read_served(path: Path) -> Measured:
    raw = read_json(path)
    try:
        served = ServedTimes.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            f"{path} is no answer of GET /times: {describe(error, ServedTimes, raw)}"
        ) from error
    seen = sum(worker.seen for worker in served.tasks if worker is not None)
    share = min(1.0, SAMPLE / max(1, seen))
    samples = [
        np.zeros(0)
        if worker is None
        else worker.times.at(_spread(max(1, round(share * worker.seen))))
        for worker in served.tasks
    ]
    return Measured(tuple(samples), served.encode)


def _spread(count: int) -> np.ndarray:
    """Return shares (count,) that a sample of so many is evenly spaced at."""
    return (np.arange(count) + 0.5) / count


def _read_lines(path: Path) -> Measured:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
    names = sorted(samples, key=lambda name: (not name.isdecimal(), name.zfill(20)))
    return Measured(tuple(np.array(samples[name]) for name in names))
