"""The outputs of a scheme's tasks, for images in coding groups."""

from __future__ import annotations

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.data import ImageSource

BATCH = 250
"""Images in one forward pass."""
GROUP_BATCH = 100
"""Groups of which one task is computed at a time."""


def task_outputs(scheme: Scheme, source: ImageSource) -> Tensor:
    """Return the output of every image's own data task, (N, n), of a systematic code."""
    parts = []
    for rows in torch.arange(len(source)).split(BATCH):
        images, _ = source.batch(rows)
        parts.append(scheme.compute(0, images[:, None]).output.cpu())
    return torch.cat(parts)


def group_outputs(
    scheme: Scheme, source: ImageSource, members: Tensor, own: Tensor | None
) -> dict[int, Tensor]:
    """Return the outputs (G, n) of all tasks of groups (G, k).

    Args:
        scheme: the code and its models.
        source: the images.
        members: rows of the source.
        own: the outputs of the images' own tasks, if the code is systematic. All workers run the
            same network, so a copy's output is the same.
    """
    needs = {t: spec.members for t, spec in scheme.rules.tasks(members.shape[1]).items()}
    outputs: dict[int, Tensor] = {}
    joint = []
    for task, wanted in needs.items():
        if own is not None and len(wanted) == 1:
            outputs[task] = own[members[:, wanted[0]]]
        else:
            joint.append(task)
    parts: dict[int, list[Tensor]] = {task: [] for task in joint}
    for rows in members.split(GROUP_BATCH) if joint else ():
        images, _ = source.batch(rows.flatten())
        queries = images.unflatten(0, tuple(rows.shape))
        for task in joint:
            computed = scheme.compute(task, queries[:, list(needs[task])])
            parts[task].append(computed.output.cpu())
    return outputs | {task: torch.cat(found) for task, found in parts.items()}
