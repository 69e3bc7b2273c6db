"""Erase workers of coding groups and count the right answers, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.patterns import erasure_patterns
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import Groups, ImageSource, random_groups
from codedinvnet.evaluation.outputs import BATCH, Outputs, group_outputs, task_outputs
from codedinvnet.progress import Progress

CORRUPTION = 10.0
"""Noise on a corrupt worker's output, in standard deviations of that task's outputs."""


@dataclass(frozen=True)
class Score:
    """What erasures did to a method's answers; accuracies in 0..1.

    Attributes:
        complete: accuracy with nobody missing or corrupt. A systematic code's answers are then the
            direct ones; a non-systematic code decodes even these.
        recovered: accuracy of the answers that the erasures concern: of a systematic code the
            erased members', of another everybody's; everybody's, too, if workers are corrupt.
        answered: share of these answers that there were. The others count as the majority class.
        patterns: accuracy by erasure pattern, over all groupings.
        counts: right and scored answers of each grouping.
    """

    complete: float
    recovered: float | None
    answered: float | None
    patterns: dict[tuple[int, ...], float]
    counts: list[tuple[int, int]]


def answers(scheme: Scheme, outputs: Mapping[int, Outputs], k: int) -> Tensor:
    """Return the classes (G, k) that these outputs (G, n) decode to; −1: no answer.

    Scores that are not all finite are none, as in the service.
    """
    groups = len(next(iter(outputs.values())))
    found = torch.full((groups, k), -1)
    for rows in torch.arange(groups).split(max(1, 4 * BATCH // k)):
        batch = {task: output[rows].to(scheme.device) for task, output in outputs.items()}
        for member, logits in scheme.decode(batch, k).items():
            sound = logits.isfinite().all(dim=1)
            found[rows, member] = torch.where(sound, logits.argmax(1), -1).cpu()
    return found


def corrupt_some(
    outputs: Mapping[int, Outputs], count: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Return the outputs (G, n) with Gaussian noise on `count` random tasks of every group."""
    tasks = sorted(outputs)
    groups = torch.arange(len(outputs[tasks[0]]))
    order = torch.rand(len(groups), len(tasks), generator=generator).argsort(dim=1)
    found: dict[int, Tensor] = {}
    for place, task in enumerate(tasks):
        hit = (order[:, :count] == place).any(dim=1)
        output = outputs[task][groups]  # a copy
        noise = torch.randn(int(hit.sum()), output.shape[1], generator=generator)
        output[hit] += CORRUPTION * output.std() * noise
        found[task] = output
    return {task: found[task] for task in outputs}


def score(
    scheme: Scheme,
    source: ImageSource,
    *,
    k: int,
    missing: int,
    groupings: int,
    seed: int,
    patterns: int,
    majority: int,
    corrupt: int = 0,
    own: Tensor | None = None,
) -> Score:
    """Erase workers in every pattern and score what is decoded.

    Args:
        scheme: the code and its models, in groups of k.
        source: the images.
        k: the group size.
        missing: how many workers of every group are missing.
        groupings: how many random groupings; those of a seed are the same for every method.
        seed: of the groupings, and of the sample of patterns.
        patterns: the most patterns to try; of more, a sample that loses extra tasks as often.
        majority: the class that a missing answer counts as.
        corrupt: how many of every group's other workers send noise.
        own: `task_outputs`, if they are known.
    """
    count = len(source)
    truth = source.labels
    systematic = is_systematic(scheme.rules)
    if systematic and own is None:
        own = task_outputs(scheme, source)
    tasks = sorted(scheme.rules.tasks(k))
    lost_sets = [
        tuple(tasks[i] for i in lost)
        for lost in erasure_patterns(k, len(tasks) - k, missing, patterns, seed)
    ]
    generator = torch.Generator().manual_seed(seed)
    counts: list[tuple[int, int]] = []
    by_pattern = {lost: [0, 0] for lost in lost_sets}
    noise = torch.Generator().manual_seed(seed)
    complete = answered = 0
    with Progress(
        total=groupings * len(lost_sets),
        desc=f"erase, k={k}",
        unit="pattern",
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        for _ in range(groupings):
            groups = random_groups(count, k, generator)
            labels = truth[groups.members]
            outputs = group_outputs(scheme, source, groups.members, own if systematic else None)
            whole = answers(scheme, outputs, k)
            complete += int(((whole == labels) & groups.counted).sum())
            before = [sum(column) for column in zip(*by_pattern.values(), strict=True)]
            for lost, concerned in _concerned(lost_sets, groups, systematic and not corrupt):
                rest = {task: output for task, output in outputs.items() if task not in lost}
                found = answers(scheme, corrupt_some(rest, corrupt, noise) if corrupt else rest, k)
                answered += int(((found >= 0) & concerned).sum())
                found = torch.where(found < 0, majority, found)
                by_pattern[lost][0] += int(((found == labels) & concerned).sum())
                by_pattern[lost][1] += int(concerned.sum())
                bar.update()
            after = [sum(column) for column in zip(*by_pattern.values(), strict=True)]
            counts.append((after[0] - before[0], after[1] - before[1]))
    right, total = (sum(column) for column in zip(*counts, strict=True))
    return Score(
        complete=complete / (count * groupings),
        recovered=right / total if total else None,
        answered=answered / total if total else None,
        patterns={lost: a / b for lost, (a, b) in by_pattern.items() if b},
        counts=counts,
    )


def _concerned(
    lost_sets: list[tuple[int, ...]], groups: Groups, systematic: bool
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield each pattern with the answers (G, k) that count in it."""
    k = groups.members.shape[1]
    for lost in lost_sets:
        members = torch.tensor([not systematic or i in lost for i in range(k)])
        yield lost, groups.counted & members
