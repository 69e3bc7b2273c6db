"""The served model as a teacher: its scores of the inputs, asked once and kept."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from codedinvnet.errors import UserError
from codedinvnet.files import write_atomically
from codedinvnet.models.base import Model
from codedinvnet.models.probe import kind_of_scores
from codedinvnet.progress import Progress
from codedinvnet.protect.images import layout
from codedinvnet.protect.inputs import Inputs
from codedinvnet.training.network import augment

Changed: TypeAlias = "Callable[[np.ndarray], np.ndarray]"
"""Changes a batch of images, as a model takes them."""

BATCH = 32
SHARD = 2048
"""Inputs whose scores are kept in one file: what a kill costs at most."""
TWICE = 16
"""Inputs that a model is asked twice: at first, and those whose scores were kept."""
_SAME = 1e-2
"""Share of the largest score by which two answers to one query may differ: they may be of other
batches, of coarse arithmetic, or from before and after a restart."""
_SAME_NORM = 1e-3
"""Share of the largest norm by which those of embeddings of unit norm differ at most."""
CHANGED, STEADY = 256, 0.9
"""Images are shifted in training if so many that are shifted keep so many of their answers. So they
are mirrored if the model cannot be asked for all mirrored ones."""


def scores_of(model: Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the scores (B, classes) of a batch, as the model has them."""
    assert model.signature.scores is not None
    return model.run(batch)[model.signature.scores.output]


def check_teacher(model: Model, inputs: Inputs) -> float:
    """Ask a model twice, and return the seconds that a query takes.

    Raises:
        UserError: if its answers differ, or are no numbers.
    """
    batch = inputs.batch(np.arange(min(TWICE, len(inputs))))
    first = scores_of(model, batch)
    began = time.perf_counter()
    second = scores_of(model, batch)
    seconds = (time.perf_counter() - began) / len(first)
    if not np.isfinite(first).all():
        raise UserError("the model's scores of the first inputs are not finite")
    if np.abs(first - second).max() > _SAME * max(float(np.abs(first).max()), 1e-6):
        raise UserError(
            "the model is not deterministic: asked twice, it gave other scores for the same inputs"
        )
    return seconds


def teacher_scores(
    model: Model, inputs: Inputs, folder: Path, *, mirrored: int | None = None
) -> np.ndarray:
    """Return the model's scores (N, classes) of all inputs; what was asked before is kept.

    Some of what is kept is asked again: nobody tells whether a server has other weights now.

    Args:
        model: the served model.
        inputs: the queries.
        folder: keeps this model's earlier scores of these inputs.
        mirrored: the axis of batches along which images are mirrored first; None: they are not.

    Raises:
        UserError: if scores are not finite, or others than those that were kept.
    """

    def asked(rows: np.ndarray) -> np.ndarray:
        batch = inputs.batch(rows)
        if mirrored is not None:
            batch = {
                key: np.ascontiguousarray(np.flip(array, mirrored)) for key, array in batch.items()
            }
        return scores_of(model, batch)

    parts = []
    name = "scores" if mirrored is None else "mirrored"
    paths = _shards(folder, name, len(inputs))
    kept = {begin: np.load(path) for begin, path in paths.items() if path.is_file()}
    if kept:
        _check_kept(kept, asked, folder)
    with Progress(
        total=len(inputs), desc=f"the model: {name}", unit="input", file=sys.stderr
    ) as bar:
        for begin, path in paths.items():
            rows = np.arange(begin, min(begin + SHARD, len(inputs)))
            if begin in kept:
                parts.append(kept[begin])
                bar.update(len(rows))
                continue
            found = []
            for part in np.split(rows, range(BATCH, len(rows), BATCH)):
                found.append(asked(part))
                bar.update(len(part))
            scores = np.concatenate(found).astype(np.float32)
            if not np.isfinite(scores).all():
                raise UserError(f"the model's scores of some inputs from {begin} on are not finite")
            content = io.BytesIO()
            np.save(content, scores)
            write_atomically(path, content.getvalue())
            parts.append(scores)
    return np.concatenate(parts)


def unasked(folder: Path, count: int) -> int:
    """Return for how many of so many inputs a folder keeps no scores."""
    paths = _shards(folder, "scores", count)
    return sum(min(SHARD, count - begin) for begin, path in paths.items() if not path.is_file())


def _shards(folder: Path, name: str, count: int) -> dict[int, Path]:
    """Return the files that keep the scores of so many inputs, by the first row of each."""
    return {begin: folder / f"{name}-{begin:08}.npy" for begin in range(0, count, SHARD)}


def _check_kept(
    kept: Mapping[int, np.ndarray], ask: Callable[[np.ndarray], np.ndarray], folder: Path
) -> None:
    """Ask a model again for some of what was kept, first row -> scores (N, classes).

    Raises:
        UserError: if it gives other scores now.
    """
    rows = np.concatenate([begin + np.arange(len(scores)) for begin, scores in kept.items()])
    some = np.linspace(0, len(rows) - 1, min(TWICE, len(rows))).astype(int)
    before, now = np.concatenate(list(kept.values()))[some], ask(rows[some])
    if not np.abs(now - before).max() <= _SAME * max(float(np.abs(before).max()), 1e-6):
        raise UserError(
            f"--out: the model gives other scores now than {folder.parent} has of it: name another "
            f"folder, or delete {folder.parent}"
        )


def shifted(model: Model, shift: int) -> Changed:
    """Return what shifts a batch of a model's images by up to so many pixels, as in training."""
    (spec,) = model.signature.inputs
    last = layout(spec)[1]
    generator = torch.Generator().manual_seed(0)

    def change(batch: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(batch)
        images = images.permute(0, 3, 1, 2) if last else images
        images = augment(images, False, shift, generator)
        return (images.permute(0, 2, 3, 1) if last else images).numpy()

    return change


def agreement_when(
    changed: Changed, model: Model, inputs: Inputs, rows: np.ndarray, answers: np.ndarray
) -> float:
    """Return how often a model gives images the same answers when they are changed.

    Args:
        changed: what is done to them.
        model: a model of one image input.
        inputs: the images.
        rows: some of them.
        answers: the model's to all inputs.
    """
    hits = []
    for part in np.split(rows, range(BATCH, len(rows), BATCH)):
        batch = {
            name: np.ascontiguousarray(changed(array)) for name, array in inputs.batch(part).items()
        }
        hits.append(scores_of(model, batch).argmax(1) == answers[part])
    return float(np.concatenate(hits).mean())


def check_scores(scores: np.ndarray) -> None:
    """Refuse scores that say nothing.

    Raises:
        UserError: if they are the same for all inputs, or one class always has the highest.
    """
    if (scores == scores[:1]).all():
        raise UserError("the model's scores are constant: the same for all inputs")
    answers = scores.argmax(axis=1)
    if (answers == answers[0]).all():
        raise UserError(
            f"the model answers class {answers[0]} to all inputs: there is nothing to learn"
        )


def check_classes(scores: np.ndarray, output: str) -> None:
    """Refuse what looks like no class scores, where nobody said that it is.

    Args:
        scores: (N, classes), of many inputs.
        output: which has them.

    Raises:
        UserError: saying how they are protected after all.
    """
    norms = np.linalg.norm(scores, axis=1)
    if kind_of_scores(scores) == "probabilities":
        return
    if scores.min() >= 0 and scores.max() <= 1:
        looks = "independent labels (all lie in 0..1, and rows do not sum to 1)"
    elif np.ptp(norms) <= _SAME_NORM * norms.max():
        looks = "an embedding (all rows have the same norm)"
    else:
        return
    raise UserError(
        f"output {output!r} of the model looks like {looks}, and not like classes: if they are "
        f"class scores, say --scores {output}:logits"
    )
