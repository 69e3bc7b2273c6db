"""The served model as a teacher: its scores of all inputs, computed once and kept on disk."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from codedinvnet.common.confidence import log_probabilities
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import content_digest, write_atomically
from codedinvnet.common.progress import Progress
from codedinvnet.models import OpenModel
from codedinvnet.models.base import DATATYPES, Model, TensorSpec, scores_tensor
from codedinvnet.models.probe import differ, kind_of_scores
from codedinvnet.protect.costs import as_onnx
from codedinvnet.protect.inputs import STREAM, Inputs, Split, image_size, is_image, layout
from codedinvnet.training.network import augment

BATCH, SHARD = 32, 2048
"""Inputs of one call, and of one file of scores: what a kill costs at most."""
TWICE, SAME = 16, 1e-2
"""So many inputs are scored twice, and their scores may differ by this share of the largest one."""
CHANGED, STEADY = 256, 0.9
"""Images are shifted in training if the model keeps this share of its answers to so many."""
LARGEST = 0.5
"""Share of an image that may be pasted over; of a sequence it may be more."""
PASTED = 0.5
"""Share of the training inputs into which parts of others are pasted, once that is needed."""
TEMPERATURES = (2.0, 1.5, 1.0)
"""By which scores are divided before they are compared, so that more than one class counts."""
MOST_ENTROPY = 2.0
"""Nats, on average: above it many classes look alike, and a lower temperature teaches more."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A served classifier with its scores of all inputs.

    Attributes:
        model: the served model.
        inputs: distinct queries.
        rows: their split.
        scores: the model's, (N, classes).
        kind: whether these are "logits" or "probabilities".
        seconds: that the model takes for a query of a batch.
        folder: keeps scores until the protection is finished.
    """

    model: OpenModel
    inputs: Inputs
    rows: Split
    scores: np.ndarray
    kind: str
    seconds: float
    folder: Path

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

    def largest_shift(self) -> int:
        """Return an eighth of the images' height if the model tolerates such shifts, else 0."""
        (spec,), generator = self.inputs.specs, torch.Generator().manual_seed(0)
        pixels, hits = image_size(spec)[0] // 8, []
        for rows in batches(self.spread(CHANGED)):
            images = torch.from_numpy(self.inputs.batch(rows)[spec.name])
            images = shifted(images, spec, pixels, generator).contiguous()
            answers = scores_of(self.model, {spec.name: images.numpy()}).argmax(1)
            hits.append(answers == self.answers[rows])
        return pixels if pixels > 1 and np.concatenate(hits).mean() >= STEADY else 0


class Lesson:
    """What students are trained with: inputs as they are (way 0), and changed in some ways.

    A way pastes a part of another image or sequence into each (CutMix, Yun et al., ICCV 2019), or
    mirrors images, or both. The model scores the training inputs in every way.

    Args:
        teacher: the served model with its inputs.
        ways: whether each mirrors, and whether it pastes.
        shift: shift images by up to so many pixels.

    Attributes:
        mirrored: whether a way mirrors, (V,).
        pasted: whether it pastes, (V,).
        logs: the model's log-probabilities, (V, N, classes); changed inputs, of training rows only.
    """

    def __init__(
        self, teacher: Teacher, ways: Sequence[tuple[bool, bool]] = (), shift: int = 0
    ) -> None:
        self.teacher, self.shift = teacher, shift
        self.mirrored, self.pasted = np.array([(False, False), *ways]).T
        train, count = teacher.rows.train, len(teacher.inputs)
        spec = teacher.inputs.specs[0]
        self._others = np.tile(np.arange(count), (len(self.pasted), 1))
        self._boxes = np.zeros((len(self.pasted), count, 4), np.int64)
        self.logs = np.stack([teacher.log_probabilities] * len(self.pasted))
        for way in range(1, len(self.pasted)):
            if self.pasted[way]:
                generator = np.random.default_rng((STREAM, self.pasted[: way + 1].sum()))
                self._others[way, train] = generator.permutation(train)
                size = image_size(spec) if is_image(spec) else (spec.shape[0], 1)
                self._boxes[way] = drawn_boxes(count, *size, generator)

            def changed(rows: np.ndarray, way: int = way) -> dict[str, np.ndarray]:
                return self.batch(rows, np.full(len(rows), way))

            scores = all_scores(teacher.model, train, changed, teacher.folder / f"way-{way}")
            self.logs[way, train] = log_probabilities(scores, teacher.kind)

    def batch(self, rows: np.ndarray, ways: np.ndarray) -> dict[str, np.ndarray]:
        """Return training inputs of these rows, each changed in one way."""
        inputs = self.teacher.inputs
        batch = inputs.batch(rows)
        if ways.any():
            others, spec = inputs.batch(self._others[ways, rows]), inputs.specs[0]
            last = not is_image(spec) or layout(spec)[1]
            boxes = self._boxes[ways, rows]
            for name, array in batch.items():
                for query, other, box in zip(array, others[name], boxes, strict=True):
                    place = (slice(*box[:2]), slice(*box[2:]))[: query.ndim]
                    part = place if last else (slice(None), *place)
                    query[part] = other[part]
                if (flips := self.mirrored[ways]).any():
                    array[flips] = np.flip(array[flips], 2 if last else 3)
        return batch

    def weights(self, pasting: bool) -> Tensor:
        """Return how often each way is taken, (V,)."""
        pasted = torch.from_numpy(self.pasted)
        share = PASTED if pasting and pasted.any() else 0.0
        shares = share / max(1, int(pasted.sum())), (1 - share) / (~pasted).sum()
        return torch.where(pasted, *shares)

    @cached_property
    def temperature(self) -> float:
        """The largest of TEMPERATURES at which the classes do not look too much alike."""
        logs = torch.from_numpy(self.teacher.log_probabilities[self.teacher.rows.train])
        for found in TEMPERATURES:
            if Categorical(logits=logs / found).entropy().mean() <= MOST_ENTROPY:
                break
        return found


def batches(rows: np.ndarray) -> list[np.ndarray]:
    """Cut rows into batches."""
    return np.split(rows, range(BATCH, len(rows), BATCH))


def shifted(images: Tensor, spec: TensorSpec, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image of a batch by up to so many pixels."""
    if not layout(spec)[1]:
        return augment(images, False, pixels, generator)
    return augment(images.permute(0, 3, 1, 2), False, pixels, generator).permute(0, 2, 3, 1)


def drawn_boxes(count: int, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Draw boxes (N, 4), by top, bottom, left and right edge, of 0 to LARGEST of an image each."""
    side = np.sqrt(generator.uniform(0, LARGEST, count))
    long = np.exp(generator.uniform(-0.5, 0.5, count) / 2)
    edges = []
    for size, share in ((height, side * long), (width, side / long)):
        length = np.clip(share * size, 1, size).astype(int)
        first = (generator.random(count) * (size - length + 1)).astype(int)
        edges += [first, first + length]
    return np.stack(edges, axis=1)


def scores_of(model: Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the scores (B, classes) of a batch."""
    return model.run(batch)[scores_tensor(model.signature).name]


def check_classifier(model: OpenModel) -> None:
    """Raise UserError, saying what is supported, unless a model classifies numbers."""
    name = model.source.source
    if any(spec.datatype == "BYTES" for spec in model.signature.inputs):
        raise UserError(f"{name}: string inputs are not supported; put the tokenizer in front")
    scores_tensor(model.signature)


def ask(model: OpenModel, inputs: Inputs, rows: Split, folder: Path, minutes: float) -> Teacher:
    """Have the model score all inputs; finished files of scores in the folder are reused.

    Raises:
        UserError: if that takes too many minutes, or its scores can't be learnt from.
    """
    spec, few = scores_tensor(model.signature), inputs.batch(np.arange(min(TWICE, len(inputs))))
    first = scores_of(model, few)
    began = time.perf_counter()
    second = scores_of(model, few)
    seconds = (time.perf_counter() - began) / len(first)
    if differ(first, second, SAME):
        raise UserError(
            "the model is not deterministic: it returned different scores for the same inputs"
        )
    known = f"{model.source.digest} {spec.name} {inputs.digest}"
    folder = folder / content_digest(known.encode())
    missing = len(inputs) - SHARD * len([*folder.glob("scores-*.npy")])
    if seconds * missing > 60 * minutes:
        raise UserError(
            f"--minutes: scoring {missing} inputs takes the model about "
            f"{seconds * missing / 60:.1f} minutes: give more minutes or fewer inputs"
        )
    scores = all_scores(model, np.arange(len(inputs)), inputs.batch, folder / "scores")
    check_scores(scores, spec.name, stated=model.source.scores is not None)
    assert model.signature.scores is not None
    kind = model.signature.scores.kind
    if ":" not in (model.source.scores or ""):
        kind = kind_of_scores(scores.astype(DATATYPES[spec.datatype]))
    return Teacher(model, inputs, rows, scores, kind, seconds, folder)


def all_scores(
    model: Model,
    rows: np.ndarray,
    batch: Callable[[np.ndarray], dict[str, np.ndarray]],
    path: Path,
) -> np.ndarray:
    """Return the model's scores (n, classes) of rows, kept in files whose names begin with a path.

    `batch` returns the inputs of some of the rows.
    """
    parts = []
    label = f"model: {path.name}"
    with Progress(total=len(rows), desc=label, unit="input", file=sys.stderr) as bar:
        for begin in range(0, len(rows), SHARD):
            file = path.with_name(f"{path.name}-{begin:08}.npy")
            if not file.is_file():
                found = []
                for part in batches(rows[begin : begin + SHARD]):
                    found.append(scores_of(model, batch(part)))
                    bar.update(len(part))
                content = io.BytesIO()
                np.save(content, np.concatenate(found).astype(np.float32))
                write_atomically(file, content.getvalue())
            parts.append(np.load(file))
    return np.concatenate(parts)


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
