"""Heads and decoding, in batches: from workers' outputs to probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme


class Job(NamedTuple):
    """Logits to compute: of one query directly, or of a group's members."""

    size: int
    """0: direct."""
    outputs: dict[int, np.ndarray]
    wanted: dict[int, int]
    """Query -> member."""


def tensors(outputs: Mapping[int, np.ndarray]) -> dict[int, Tensor]:
    """Return outputs as tensors with a batch of one."""
    return {task: torch.from_numpy(output)[None] for task, output in outputs.items()}


def compute(scheme: Scheme, jobs: Sequence[Job]) -> list[dict[int, np.ndarray]]:
    """Return for each job the probabilities (classes,) of the queries it wants.

    Direct answers are computed together, and so are decodings of equal size and with the same
    outputs at hand.
    """
    found: list[dict[int, np.ndarray]] = [{} for _ in jobs]
    direct = [i for i, job in enumerate(jobs) if job.size == 0]
    if direct:
        stacked = torch.from_numpy(np.stack([jobs[i].outputs[0] for i in direct]))
        logits = scheme.direct(stacked)
        assert logits is not None
        for row, i in zip(probabilities(logits), direct, strict=True):
            found[i] = {query: row for query in jobs[i].wanted}
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i, job in enumerate(jobs):
        if job.size:
            alike.setdefault((job.size, tuple(sorted(job.outputs))), []).append(i)
    for (size, tasks), rows in alike.items():
        outputs = {t: torch.from_numpy(np.stack([jobs[i].outputs[t] for i in rows])) for t in tasks}
        answers = scheme.decode(outputs, size)
        for position, i in enumerate(rows):
            for query, member in jobs[i].wanted.items():
                found[i][query] = probabilities(answers[member][position][None])[0]
    return found


def compute_apart(scheme: Scheme, jobs: Sequence[Job]) -> list[dict[int, np.ndarray] | Exception]:
    """Compute jobs together; if that fails, each for itself, so that none fails for another."""
    try:
        return list(compute(scheme, jobs))
    except Exception:
        found: list[dict[int, np.ndarray] | Exception] = []
        for job in jobs:
            try:
                found += compute(scheme, [job])
            except Exception as error:
                found.append(error)
        return found


def probabilities(logits: Tensor) -> np.ndarray:
    """Return the softmax of logits (B, classes)."""
    return np.asarray(logits.float().softmax(1).cpu().numpy())


def check_group(
    scheme: Scheme, outputs: Mapping[int, np.ndarray], size: int, member: int
) -> tuple[bool | None, float | None]:
    """Return whether a member's decoded label is its direct one, and the group's residual."""
    complete = tensors(outputs)
    residual = scheme.residual(complete, size)
    agrees: bool | None = None
    direct = scheme.direct(complete[member]) if member in complete else None
    if direct is not None:
        rest = {task: output for task, output in complete.items() if task != member}
        decoded = scheme.decode(rest, size).get(member)
        if decoded is not None:
            agrees = int(decoded.argmax(1)) == int(direct.argmax(1))
    return agrees, None if residual is None else float(residual[0])
