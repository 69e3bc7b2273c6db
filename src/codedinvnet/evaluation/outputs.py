"""The outputs of a scheme's tasks, for images in coding groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.data import ImageSource
from codedinvnet.errors import UserError

BATCH = 250
"""Images in one forward pass."""
GROUP_BATCH = 100
"""Groups of which one task is computed at a time."""


class Outputs(Protocol):
    """One task's outputs (G, n) of groups: a tensor, or `Picked`."""

    def __len__(self) -> int:
        """Count the groups."""

    def __getitem__(self, groups: Tensor) -> Tensor:
        """Return those (B, n) of some groups (B,) int64."""


@dataclass(frozen=True, eq=False)
class Picked:
    """Outputs (G, n) that are looked up in those of all images, which may fill half the memory.

    Attributes:
        own: the outputs (N, n) of the images' own tasks.
        rows: which image is each group's, (G,) int64.
    """

    own: Tensor
    rows: Tensor

    def __len__(self) -> int:
        """Count the groups."""
        return len(self.rows)

    def __getitem__(self, groups: Tensor) -> Tensor:
        """Return those (B, n) of some groups (B,) int64."""
        return self.own[self.rows[groups]]


def task_outputs(scheme: Scheme, source: ImageSource) -> Tensor:
    """Return the output of every image's own data task, (N, n), of a systematic code."""
    batches = torch.arange(len(source)).split(BATCH)
    return _filled(
        len(source),
        ((rows, scheme.compute(0, source.batch(rows)[0][:, None]).output) for rows in batches),
    )


def direct_answers(scheme: Scheme, own: Tensor, device: torch.device) -> Tensor:
    """Return the scores (N, classes) of outputs (N, n) of a systematic code's own data tasks.

    Args:
        scheme: the code and its models.
        own: the outputs, wherever they lie.
        device: where their answers are computed, a batch at a time.

    Raises:
        ValueError: if the code is not systematic.
    """
    found = []
    for part in own.split(BATCH):
        scores = scheme.direct(part.to(device))
        if scores is None:
            raise ValueError("a code that is not systematic has no direct answers")
        found.append(scores.cpu())
    return torch.cat(found)


def _filled(count: int, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Return outputs (count, n) of parts, rows (B,) and outputs (B, n); they are held once."""
    rows, output = next(parts)
    found = torch.empty((count, *output.shape[1:]), dtype=output.dtype)
    found[rows] = output.cpu()
    for rows, output in parts:
        found[rows] = output.cpu()
    return found


def group_outputs(
    scheme: Scheme,
    source: ImageSource,
    members: Tensor,
    own: Tensor | None,
    encoded: Tensor | None = None,
) -> dict[int, Outputs]:
    """Return the outputs (G, n) of all tasks of groups (G, k).

    Args:
        scheme: the code and its models.
        source: the images.
        members: rows of the source, and of `own` if that is there.
        own: the outputs of the images' own tasks, if the code is systematic. A task that is the
            same as a member's own has the same output. They are not copied.
        encoded: rows of the source (G, k) that the other tasks are of; None: the members.
    """
    encoded = members if encoded is None else encoded
    tasks = scheme.rules.tasks(members.shape[1])
    outputs: dict[int, Outputs] = {}
    joint = []
    for task, spec in tasks.items():
        if own is not None and spec == tasks[spec.members[0]]:
            outputs[task] = Picked(own, members[:, spec.members[0]])
        else:
            joint.append(task)
    parts: dict[int, list[Tensor]] = {task: [] for task in joint}
    for rows in encoded.split(GROUP_BATCH) if joint else ():
        images, _ = source.batch(rows.flatten())
        queries = images.unflatten(0, tuple(rows.shape))
        for task in joint:
            computed = scheme.compute(task, queries[:, list(tasks[task].members)])
            parts[task].append(computed.output.cpu())
    for task in joint:
        outputs[task] = torch.cat(parts.pop(task))
    return outputs


def each_missing(scheme: Scheme, outputs: Mapping[int, Tensor], k: int) -> Tensor:
    """Return the scores (B, k, classes) of each member as if it alone were missing.

    Args:
        scheme: the code and its models.
        outputs: task -> (B, n), of all tasks.
        k: members of a group.

    Raises:
        UserError: if the method cannot decode a member.
    """
    found = []
    for member in range(k):
        answers = scheme.decode({t: output for t, output in outputs.items() if t != member}, k)
        if member not in answers:
            raise UserError(f"{scheme.name} cannot decode member {member} of a group of {k}")
        found.append(answers[member].cpu())
    return torch.stack(found, 1)
