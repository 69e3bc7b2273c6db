"""Codes around a frozen model that need no training: their answers when a worker is missing."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.method import Given
from codedinvnet.codes.registry import find_method
from codedinvnet.errors import UserError
from codedinvnet.models.base import Model, Signature, mixed_tensor, scores_tensor
from codedinvnet.models.scores import ScoresOf
from codedinvnet.progress import Progress
from codedinvnet.protect.inputs import Inputs

MOST = 2000
"""Inputs that a code is measured on: k + 1 queries for k answers take long."""
TUNED = 300
"""Inputs on which regularisers are chosen."""
CANDIDATES = (0.0, 1e-5, 1e-3, 1e-1)
"""Regularisers that are tried."""
GROUPS = 25
"""Groups that are computed at a time."""


def refusal(signature: Signature) -> str:
    """Return why no code mixes a model's queries, or ""."""
    try:
        mixed_tensor(signature)
    except UserError as error:
        return str(error)
    return ""


def build(name: str, model: Model, k: int, smoothing: tuple[float, float] | None = None) -> Scheme:
    """Return the scheme of an untrained method around a model."""
    return find_method(name).build(_given(model, k, smoothing))


def _given(model: Model, k: int, smoothing: tuple[float, float] | None = None) -> Given:
    shape, classes = mixed_tensor(model.signature).shape, scores_tensor(model.signature).shape[0]
    chosen = {} if smoothing is None else {"smoothing": smoothing}
    return Given(k, ScoresOf(model), shape, classes, chosen=chosen)


def tuned(
    name: str,
    model: Model,
    k: int,
    inputs: Inputs,
    rows: np.ndarray,
    answers: np.ndarray,
    seed: int,
) -> Scheme:
    """Return the scheme with the regularisers that agree most often on the validation inputs.

    Args:
        name: the method's name.
        model: the served model.
        k: members of a group.
        inputs: all queries.
        rows: the validation inputs.
        answers: the model's to all inputs.
        seed: the seed of the random groups.
    """
    method = find_method(name)
    if not method.tuned or len(rows) < k:
        return build(name, model, k)
    rows = np.random.default_rng(seed).permutation(rows)[: min(len(rows), TUNED) // k * k]
    groups = _floats(inputs, rows).unflatten(0, (-1, k))
    labels = torch.from_numpy(answers[rows]).unflatten(0, (-1, k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a regulariser at the end of few candidates
        chosen = method.tune(_given(model, k), groups, labels, CANDIDATES)  # type: ignore[call-arg]
    return build(name, model, k, tuple(chosen["smoothing"]))


def _floats(inputs: Inputs, rows: np.ndarray) -> Tensor:
    """Return queries (N, *shape) as a worker encodes them: float32, whatever the model takes."""
    (batch,) = inputs.batch(rows).values()
    return torch.from_numpy(batch.astype(np.float32))


def decoded(
    scheme: Scheme, inputs: Inputs, rows: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return decoded scores of some inputs, in random groups with one random worker missing.

    Args:
        scheme: a code with its models.
        inputs: all queries.
        rows: which; those that fill no group are left out.
        seed: the seed of the random groups.

    Returns:
        The rows (N,) that were answered, their scores (N, classes), and their groups (N,).
    """
    k = scheme.rules.k
    generator = np.random.default_rng(seed)
    rows = generator.permutation(rows)[: max(min(len(rows), MOST) // k, 1) * k].reshape(-1, k)
    tasks = sorted(scheme.rules.tasks(k))
    lost = generator.choice(tasks, len(rows))
    found = []
    bar = Progress(total=len(rows), desc=scheme.name, unit="group", leave=False)
    for begin in range(0, len(rows), GROUPS):
        part = rows[begin : begin + GROUPS]
        queries = _floats(inputs, part.ravel()).unflatten(0, part.shape)
        outputs = {task: scheme.compute(task, queries).output for task in tasks}
        for place in range(len(part)):
            rest = {
                task: output[place : place + 1]
                for task, output in outputs.items()
                if task != lost[begin + place]
            }
            answers = scheme.decode(rest, k)
            found.append(torch.cat([answers[i] for i in range(k)]))
        bar.update(len(part))
    bar.close()
    groups = np.repeat(np.arange(len(rows)), k)
    return rows.ravel(), torch.cat(found).numpy(), groups
