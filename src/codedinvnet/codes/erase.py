"""Erase workers of coding groups, decode what is left, and count: every accuracy is made of this.

`erase` returns one long frame with a line for each answer; recovered accuracy, agreement, coverage
and the worst position are groupbys of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from pandas import Categorical, DataFrame, Index
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import is_systematic
from codedinvnet.common.confidence import confidences
from codedinvnet.common.devices import whole_float32
from codedinvnet.common.progress import Progress
from codedinvnet.data import random_groups

BATCH = 250
"""Queries in one forward pass."""
GROUPS = 100
"""Groups of which one task is computed at a time."""
NO_ANSWER = -1
"""The prediction of an answer that a code does not have, and the direct one of a code without."""
Pattern = tuple[int, ...]
"""The tasks of a group that are missing; () where none is."""


class Queries(Protocol):
    """Labelled queries, such as an `ImageSource`."""

    @property
    def labels(self) -> Tensor:
        """The labels (N,)."""

    def __len__(self) -> int:
        """Return how many there are."""

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, *shape) and their labels (B,)."""


def task_outputs(scheme: Scheme, source: Queries) -> Tensor:
    """Return the output of every query's own data task, (N, n), of a systematic code."""
    parts = [
        scheme.compute(0, source.batch(rows)[0][:, None]).output.cpu()
        for rows in torch.arange(len(source)).split(BATCH)
    ]
    return torch.cat(parts)


def direct_answers(scheme: Scheme, own: Tensor, device: torch.device | None = None) -> Tensor:
    """Return the scores (N, classes) of outputs (N, n) of a systematic code's data tasks.

    Raises:
        ValueError: if the code is not systematic.
    """
    found = []
    for part in own.split(BATCH):
        scores = scheme.direct(part.to(device or scheme.device))
        if scores is None:
            raise ValueError(f"{scheme.name} is not systematic: it has no direct answers")
        found.append(scores.cpu())
    return torch.cat(found)


def group_outputs(
    scheme: Scheme,
    source: Queries,
    members: Tensor,
    own: Tensor | None,
    encoded: Tensor | None = None,
) -> dict[int, Tensor]:
    """Return the outputs (G, n) of all tasks of groups (G, k).

    Args:
        scheme: the code and its models.
        source: the queries.
        members: rows of the source, and of `own`.
        own: `task_outputs` of a systematic code; a task that is the same as a member's own has the
            same output.
        encoded: the rows (G, k) that the other tasks encode; None: the members.
    """
    tasks = scheme.rules.tasks(members.shape[1])
    alike = [t for t, spec in tasks.items() if own is not None and spec == tasks[spec.members[0]]]
    found: dict[int, list[Tensor]] = {task: [] for task in tasks}
    encoded = members if encoded is None else encoded
    for rows in encoded.split(GROUPS) if len(alike) < len(tasks) else ():
        queries = source.batch(rows.flatten())[0].unflatten(0, tuple(rows.shape))
        for task, spec in tasks.items():
            if task not in alike:
                computed = scheme.compute(task, queries[:, list(spec.members)])
                found[task].append(computed.output.cpu())
    for task in alike:
        assert own is not None
        found[task].append(own[members[:, tasks[task].members[0]]])
    return {task: torch.cat(parts) for task, parts in found.items()}


def single_losses(k: int) -> list[Pattern]:
    """Return the patterns in which one member's own task is missing."""
    return [(member,) for member in range(k)]


def erase(
    scheme: Scheme,
    source: Queries,
    patterns: Iterable[Pattern],
    *,
    k: int,
    groupings: int = 1,
    seed: int = 0,
    own: Tensor | None = None,
    shuffle_parity: bool = False,
    progress: bool = True,
) -> DataFrame:
    """Erase tasks of every group in every pattern, and decode the rest.

    Args:
        scheme: the code and its models.
        source: the queries.
        patterns: the sets of tasks that are missing, one after another; () erases none.
        k: the members of a group.
        groupings: how many random groupings; those of a seed are the same for every method.
        seed: the seed of the groupings.
        own: `task_outputs` of a systematic code, if they are known.
        shuffle_parity: give every group the extra tasks' outputs of another group.
        progress: show a progress bar.

    Returns:
        A line for each erased member in each pattern; for every member if the code is not
        systematic. Its columns are `grouping`, `group`, `member`, `lost`
        (the pattern), `query` (its row), `prediction` and `confidence` of the decoded answer, the
        `direct` prediction and the `label`. Scores that are not finite are no answer.
    """
    patterns = list(patterns)
    systematic = is_systematic(scheme.rules)
    if systematic and own is None:
        own = task_outputs(scheme, source)
    direct = (
        direct_answers(scheme, own).argmax(1)
        if systematic and own is not None
        else torch.full((len(source),), NO_ANSWER)
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_groups(len(source), k, generator) for _ in range(groupings)]
    size = min(GROUPS, max(1, 4 * BATCH // k))
    batches = [
        (grouping, groups, rows)
        for grouping, groups in enumerate(drawn)
        for rows in torch.arange(len(groups.members)).split(size)
    ]
    how: dict[str, Any] = {"desc": f"erase, k={k}", "unit": "batch", "leave": False}
    lines: list[tuple[Tensor, ...]] = []
    with whole_float32(), Progress(batches, **how, dynamic_ncols=True, disable=not progress) as bar:
        for grouping, groups, rows in bar:
            members = groups.members[rows]
            encoded = groups.members.roll(1, 0)[rows] if shuffle_parity else members
            outputs = group_outputs(scheme, source, members, own, encoded)
            for place, lost in enumerate(patterns):
                rest = {task: out for task, out in outputs.items() if task not in lost}
                kept = groups.counted[rows]
                if systematic:
                    kept = kept & torch.tensor([i in lost for i in range(k)])
                if kept.any():
                    group, member = kept.nonzero(as_tuple=True)
                    where = (torch.full_like(group, at) for at in (grouping, place))
                    answers = (found[group, member] for found in _decoded(scheme, rest, k))
                    query = members[group, member]
                    lines.append((*where, rows[group], member, query, *answers))
    return _frame(lines, patterns, direct, source.labels)


def recovered_accuracy(scheme: Scheme, source: Queries, own: Tensor) -> float:
    """Return the accuracy of decoded answers, each query erased once in one fixed grouping.

    Trainings choose their best epoch by it.

    Args:
        scheme: a systematic code with its models.
        source: the queries.
        own: the outputs (N, n) of the queries' own tasks, on the processor.
    """
    k = scheme.rules.k
    frame = erase(scheme, source, single_losses(k), k=k, seed=k, own=own, progress=False)
    return float((frame["prediction"] == frame["label"]).mean())


def _frame(
    lines: Iterable[tuple[Tensor, ...]], patterns: list[Pattern], direct: Tensor, labels: Tensor
) -> DataFrame:
    """Return the frame of parts of its columns, with direct predictions (N,) and labels (N,)."""
    names = ("grouping", "lost", "group", "member", "query", "prediction", "confidence")
    parts = [*zip(*lines, strict=True)] or [(torch.zeros(0, dtype=torch.int64),)] * len(names)
    columns = dict(zip(names, map(torch.cat, parts), strict=True))
    columns |= {"direct": direct[columns["query"]], "label": labels[columns["query"]]}
    frame = DataFrame({name: column.numpy() for name, column in columns.items()})
    known = Index(patterns, tupleize_cols=False)
    return frame.assign(lost=Categorical.from_codes(frame["lost"], known))


def _decoded(scheme: Scheme, outputs: Mapping[int, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the predictions (G, k) and confidences that outputs (G, n) decode to."""
    groups = len(next(iter(outputs.values())))
    found = torch.full((groups, k), NO_ANSWER)
    sure = torch.zeros(groups, k)
    for rows in torch.arange(groups).split(max(1, 4 * BATCH // k)):
        batch = {task: output[rows].to(scheme.device) for task, output in outputs.items()}
        for member, scores in scheme.decode(batch, k).items():
            scores = scores.cpu()
            sound = scores.isfinite().all(dim=1)
            found[rows, member] = torch.where(sound, scores.argmax(1), NO_ANSWER)
            with np.errstate(invalid="ignore"):
                sure[rows, member] = torch.from_numpy(confidences(scores.numpy(), "logits"))
    return found, sure.nan_to_num()
