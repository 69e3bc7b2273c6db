"""The served model as a teacher: its scores of all inputs, computed once and kept on disk."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from codedinvnet.common.confidence import log_probabilities
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import content_digest, write_atomically
from codedinvnet.common.progress import Progress
from codedinvnet.models import OpenModel
from codedinvnet.models.base import DATATYPES, Model, can_be_scores, scores_tensor
from codedinvnet.models.probe import differ, kind_of_scores
from codedinvnet.protect.costs import as_onnx
from codedinvnet.protect.inputs import STREAM, Inputs, Split, image_size, layout
from codedinvnet.training.network import augment

BATCH, SHARD = 32, 2048
"""Inputs of one call, and of one file of scores: what a kill costs at most."""
TWICE, SAME = 16, 1e-2
"""So many inputs are scored twice, and their scores may differ by this share of the largest one."""
CHANGED, STEADY = 256, 0.9
"""Images are shifted in training if the model keeps this share of its answers to so many."""

LARGEST = 0.5
"""Share of an image that may be pasted over."""

Change = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Changes a batch of images, of these rows."""


class Variant(NamedTuple):
    """What the model answers if each image is changed in one way.

    A box of another image is pasted in (CutMix, Yun et al., ICCV 2019), and then all is mirrored.

    Attributes:
        logs: the model's log-probabilities (N, classes).
        mirrored: whether images are mirrored.
        others: the rows from which boxes are pasted, (N,).
        boxes: their top, bottom, left and right edges, (N, 4).
    """

    logs: np.ndarray
    mirrored: bool
    others: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True, eq=False)
class Teacher:
    """A served classifier with its scores of all inputs.

    Attributes:
        model: the served model.
        inputs: distinct queries.
        rows: their split.
        scores: the model's, (N, classes).
        folder: keeps scores until the protection is finished.
    """

    model: OpenModel
    inputs: Inputs
    rows: Split
    scores: np.ndarray
    folder: Path

    @property
    def kind(self) -> str:
        """Whether the scores are "logits" or "probabilities"."""
        assert self.model.signature.scores is not None
        return self.model.signature.scores.kind

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.scores.shape[1])

    @cached_property
    def answers(self) -> np.ndarray:
        """The predicted classes, (N,)."""
        answers: np.ndarray = self.scores.argmax(axis=1)
        return answers

    @cached_property
    def log_probabilities(self) -> np.ndarray:
        """The scores as logarithms of probabilities, (N, classes)."""
        return log_probabilities(self.scores, self.kind)

    @cached_property
    def onnx(self) -> Any:
        """The model as an `onnx.ModelProto`; raises if there is no way to make one."""
        return as_onnx(self.model, self.inputs.batch(self.spread(TWICE)))

    def spread(self, count: int) -> np.ndarray:
        """Return so many training rows, evenly spread: the first ones may be of few classes."""
        rows = self.rows.train
        count = min(count, len(rows))
        found: np.ndarray = rows[np.arange(count) * len(rows) // count]
        return found

    def variant(self, number: int, mirrored: bool, pasted: bool) -> Variant:
        """Have the model score one variant of the training images."""
        (spec,), train = self.inputs.specs, self.rows.train
        generator = np.random.default_rng((STREAM, number))
        others, boxes = np.arange(len(self.inputs)), np.zeros((len(self.inputs), 4), np.int64)
        if pasted:
            others[train] = generator.permutation(train)
            boxes = drawn_boxes(len(self.inputs), *image_size(spec), generator)

        def change(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
            (more,) = self.inputs.batch(others[rows]).values()
            flips = np.full(len(rows), mirrored)
            return changed_images(images, more, boxes[rows], flips, layout(spec)[1])

        scores = all_scores(
            self.model, self.inputs, self.folder, f"variant-{number}", change, train
        )
        logs = log_probabilities(scores, self.kind)
        return Variant(logs, mirrored, others, boxes)

    def largest_shift(self) -> int:
        """Return an eighth of the images' height if the model tolerates such shifts, else 0."""
        pixels = image_size(self.inputs.specs[0])[0] // 8
        last = layout(self.inputs.specs[0])[1]
        generator = torch.Generator().manual_seed(0)

        def shifted(batch: np.ndarray, rows: np.ndarray) -> np.ndarray:
            images = torch.from_numpy(batch)
            images = images.permute(0, 3, 1, 2) if last else images
            images = augment(images, False, pixels, generator)
            return (images.permute(0, 2, 3, 1) if last else images).numpy()

        hits = [
            scores_of(self.model, changed(self.inputs, part, shifted)).argmax(1)
            == self.answers[part]
            for part in batches(self.spread(CHANGED))
        ]
        return pixels if pixels > 1 and np.concatenate(hits).mean() >= STEADY else 0


def batches(rows: np.ndarray) -> list[np.ndarray]:
    """Cut rows into batches."""
    return np.split(rows, range(BATCH, len(rows), BATCH))


def changed(inputs: Inputs, rows: np.ndarray, change: Change | None) -> dict[str, np.ndarray]:
    """Return inputs of these rows, changed."""
    batch = inputs.batch(rows)
    if change is None:
        return batch
    return {name: np.ascontiguousarray(change(array, rows)) for name, array in batch.items()}


def drawn_boxes(count: int, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Draw boxes (N, 4) whose area is evenly spread from 0 to LARGEST of an image."""
    side = np.sqrt(generator.uniform(0, LARGEST, count))
    long = np.exp(generator.uniform(-0.5, 0.5, count) / 2)
    edges = []
    for size, share in ((height, side * long), (width, side / long)):
        length = np.clip(share * size, 1, size).astype(int)
        first = (generator.random(count) * (size - length + 1)).astype(int)
        edges += [first, first + length]
    return np.stack(edges, axis=1)


def changed_images(
    images: np.ndarray, others: np.ndarray, boxes: np.ndarray, flips: np.ndarray, last: bool
) -> np.ndarray:
    """Paste boxes (B, 4) of other images (B, *shape), and mirror some of the results.

    `last` says that channels come last.
    """
    height, width = images.shape[1:3] if last else images.shape[2:]
    y, x = np.arange(height), np.arange(width)
    top, bottom, left, right = boxes.T[:, :, None]
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]
    found = np.where(inside[..., None] if last else inside[:, None], others, images)
    found[flips] = np.flip(found[flips], 2 if last else 3)
    return found


def scores_of(model: Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the scores (B, classes) of a batch."""
    return model.run(batch)[scores_tensor(model.signature).name]


def check_classifier(model: OpenModel) -> None:
    """Raise UserError, saying what is supported, unless a model classifies numbers."""
    signature, name = model.signature, model.source.source
    if model.source.kind == "bundle":
        raise UserError(f"{name} is a bundle, which comes with a small backup: serve it as it is")
    if any(spec.datatype == "BYTES" for spec in signature.inputs):
        raise UserError(f"{name}: string inputs are not supported; put the tokenizer in front")
    if signature.scores is not None:
        return
    outputs = ", ".join(f"{spec.name!r} {spec.datatype} {spec.shape}" for spec in signature.outputs)
    if any(can_be_scores(spec) for spec in signature.outputs):
        raise UserError(f"{name}: name the output with the class scores: --scores NAME ({outputs})")
    raise UserError(
        f"{name} returns {outputs}: only classifiers, with float scores (B, classes), can be "
        "protected; regressions and embeddings are not supported yet, use policy hedge"
    )


def ask(model: OpenModel, inputs: Inputs, rows: Split, folder: Path, minutes: float) -> Teacher:
    """Have the model score all inputs; finished files of scores in the folder are reused.

    Raises:
        UserError: if that takes too many minutes, or its scores can't be learnt from.
    """
    spec = scores_tensor(model.signature)
    name = content_digest(spec.name.encode())
    folder = folder / f"scores-{model.source.digest}-{name}-{inputs.digest()}"
    missing = len(inputs) - SHARD * len([*folder.glob("scores-*.npy")])
    seconds = query_seconds(model, inputs) * missing
    if seconds > 60 * minutes:
        raise UserError(
            f"--minutes: scoring {missing} inputs takes the model about {seconds / 60:.1f} minutes:"
            " give more minutes or fewer inputs"
        )
    scores = all_scores(model, inputs, folder)
    check_scores(scores, spec.name, stated=model.source.scores is not None)
    kind = kind_of_scores(scores.astype(DATATYPES[spec.datatype]))
    assert model.signature.scores is not None
    if ":" not in (model.source.scores or "") and kind != model.signature.scores.kind:
        model = replace(model.source, scores=f"{spec.name}:{kind}").open()
    return Teacher(model, inputs, rows, scores, folder)


def query_seconds(model: Model, inputs: Inputs) -> float:
    """Return the seconds of one query in a batch; UserError if scores differ in a second call."""
    batch = inputs.batch(np.arange(min(TWICE, len(inputs))))
    first = scores_of(model, batch)
    began = time.perf_counter()
    second = scores_of(model, batch)
    seconds = (time.perf_counter() - began) / len(first)
    if differ(first, second, SAME):
        raise UserError(
            "the model is not deterministic: it returned different scores for the same inputs"
        )
    return seconds


def all_scores(
    model: Model,
    inputs: Inputs,
    folder: Path,
    name: str = "scores",
    change: Change | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """Return the model's scores (N, classes) of inputs, which may be changed first.

    Rows that are not among the `wanted` ones (None: all are) have the scores 0.
    """
    wanted = np.arange(len(inputs)) if wanted is None else wanted
    parts = []
    with Progress(total=len(wanted), desc=f"model: {name}", unit="input", file=sys.stderr) as bar:
        for begin in range(0, len(wanted), SHARD):
            path = folder / f"{name}-{begin:08}.npy"
            if not path.is_file():
                found = []
                for part in batches(wanted[begin : begin + SHARD]):
                    found.append(scores_of(model, changed(inputs, part, change)))
                    bar.update(len(part))
                content = io.BytesIO()
                np.save(content, np.concatenate(found).astype(np.float32))
                write_atomically(path, content.getvalue())
            parts.append(np.load(path))
    scores = np.zeros((len(inputs), parts[0].shape[1]), np.float32)
    scores[wanted] = np.concatenate(parts)
    return scores


def check_scores(scores: np.ndarray, output: str, *, stated: bool) -> None:
    """Raise UserError if scores are not finite, constant, or look like labels or an embedding.

    The user may have stated that an output of this name has class scores, whatever they look like.
    """
    if not np.isfinite(scores).all():
        raise UserError("the model's scores of some inputs are not finite")
    answers = scores.argmax(axis=1)
    if (answers == answers[0]).all():
        raise UserError(f"the model answers class {answers[0]} to all inputs: nothing to learn")
    if stated or kind_of_scores(scores) == "probabilities":
        return
    norms = np.linalg.norm(scores, axis=1)
    if scores.min() >= 0 and scores.max() <= 1:
        looks = "independent labels (values in 0..1 that do not sum to 1)"
    elif np.ptp(norms) <= 1e-3 * norms.max():
        looks = "an embedding (all rows have the same norm)"
    else:
        return
    raise UserError(
        f"output {output!r} looks like {looks}, which is not supported yet: if these are class "
        f"scores, say --scores {output}:logits"
    )
