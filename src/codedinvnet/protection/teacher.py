"""The served model as a teacher: its answers to all inputs, computed once and kept on disk."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from codedinvnet.common.errors import UserError
from codedinvnet.common.files import content_digest, write_atomically
from codedinvnet.common.progress import Progress
from codedinvnet.models import OpenModel
from codedinvnet.models.base import FLOATING, Model, Signature, TensorSpec, can_be_scores
from codedinvnet.models.probe import differ
from codedinvnet.protection.costs import as_onnx
from codedinvnet.protection.inputs import STREAM, Inputs, Split, image_size, is_image, layout
from codedinvnet.protection.tasks import MOST_NUMBERS, TASKS, Classify, Regress, Task, is_classifier
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

Run: TypeAlias = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Returns a model's answers to a batch, flattened."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A served model with its answers to all inputs.

    Attributes:
        model: the served model.
        output: of the model, which is protected.
        task: what it means.
        inputs: distinct queries.
        rows: their split.
        outputs: the model's, flattened, (N, size).
        seconds: that the model takes for a query of a batch.
        folder: keeps outputs until the protection is finished.
    """

    model: OpenModel
    output: TensorSpec
    task: Task
    inputs: Inputs
    rows: Split
    outputs: np.ndarray
    seconds: float
    folder: Path

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the model's answers to a batch, flattened."""
        return answers_of(self.model, self.output.name, batch)

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
            found = self.run({spec.name: images.numpy()})
            hits.append(self.task.agree(found, self.outputs[rows]))
        return pixels if pixels > 1 and np.concatenate(hits).mean() >= STEADY else 0


class Lesson:
    """What students are trained with: inputs as they are (way 0), and changed in some ways.

    A way pastes a part of another image or sequence into each (CutMix, Yun et al., ICCV 2019), or
    mirrors images, or both. The model answers the training inputs in every way.

    Args:
        teacher: the served model with its inputs.
        ways: whether each mirrors, and whether it pastes.
        shift: shift images by up to so many pixels.

    Attributes:
        mirrored: whether a way mirrors, (V,).
        pasted: whether it pastes, (V,).
        targets: what is learnt, (V, N, size); of changed inputs, for training rows only.
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
        self.targets = np.stack([teacher.task.targets(teacher.outputs)] * len(self.pasted))
        for way in range(1, len(self.pasted)):
            if self.pasted[way]:
                generator = np.random.default_rng((STREAM, self.pasted[: way + 1].sum()))
                self._others[way, train] = generator.permutation(train)
                size = image_size(spec) if is_image(spec) else (spec.shape[0], 1)
                self._boxes[way] = drawn_boxes(count, *size, generator)

            def changed(rows: np.ndarray, way: int = way) -> dict[str, np.ndarray]:
                return self.batch(rows, np.full(len(rows), way))

            found = all_answers(teacher.run, train, changed, teacher.folder / f"way-{way}")
            fine = np.isfinite(found).all(1)  # a mask may hide all of a pasted text
            self.targets[way, train[fine]] = teacher.task.targets(found[fine])
            self._boxes[way, train[~fine]] = 0

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


def answers_of(model: Model, output: str, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a model's answers to a batch, flattened, (B, size)."""
    found = model.run(batch)[output]
    return found.reshape(len(found), -1)


def protected_output(model: OpenModel, named: str | None, task: str | None) -> TensorSpec:
    """Return the output that is protected: the named one, or the only one that the task allows.

    Raises:
        UserError: if there is none, or there are several.
    """
    signature, source = model.signature, model.source
    if any(spec.datatype == "BYTES" for spec in signature.inputs):
        raise UserError(
            f"{source.source}: string inputs are not supported; put the tokenizer in front"
        )
    if named is None and source.scores is not None and signature.scores is not None:
        named = signature.scores.output
    found = [spec for spec in signature.outputs if _fits(spec, task)]
    if named is not None:
        found = [spec for spec in found if spec.name == named]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(spec.name for spec in found)
        raise UserError(f"name the output that is protected: --output {names}")
    raise UserError(_none(signature, named, task))


def _fits(spec: TensorSpec, task: str | None) -> bool:
    """Return whether an output can have a task's answers; None: any task's."""
    if task == Classify.name:
        return can_be_scores(spec)
    return spec.datatype in FLOATING and math.prod(spec.shape) <= MOST_NUMBERS


def _none(signature: Signature, named: str | None, task: str | None) -> str:
    """Return why no output can be protected."""
    for spec in signature.outputs:
        if task == Classify.name and len(spec.shape) > 1 and set(spec.shape[1:]) == {1}:
            return (
                f"output {spec.name!r} has the shape {spec.shape} for a query: add a flatten, so "
                f"that it becomes ({spec.shape[0]},)"
            )
    shapes = (f"{s.name} {s.datatype} {s.shape}" for s in signature.outputs)
    wanted = f"--output {named}" if named else "a protected output"
    what = "floats (B, classes)" if task == Classify.name else f"at most {MOST_NUMBERS} floats"
    return f"{wanted} must be {what}; the model's are {', '.join(shapes)}"


def ask(
    model: OpenModel,
    inputs: Inputs,
    rows: Split,
    folder: Path,
    minutes: float,
    *,
    task: str | None = None,
    output: str | None = None,
    tolerance: str | None = None,
    cosine: float | None = None,
) -> Teacher:
    """Have the model answer all inputs; finished files of answers in the folder are reused.

    Args:
        model: the served model.
        inputs: distinct queries.
        rows: their split.
        folder: for the answers.
        minutes: that all may take.
        task: a name of `TASKS`; None: the model's own file must prove that it is a classifier.
        output: the name of the one to protect; None: the only one that will do.
        tolerance: of regressions, see `Regress`.
        cosine: of embeddings, see `Embed`.

    Raises:
        UserError: if that takes too long, or there is nothing to learn, or the task is unclear.
    """
    scores = model.source.scores  # whoever states what class scores are has a classifier
    task = task or (Classify.name if scores is not None else None)
    spec = protected_output(model, output, task)
    few = inputs.batch(np.arange(min(TWICE, len(inputs))))
    if task is None:
        task = _proved(model, spec, few)
    if task == Regress.name and tolerance is None:  # before a model that may be slow is asked
        raise UserError(
            "--task regress needs --tolerance, by how much an approximate answer may differ: "
            "0.2 in units of the output, or 5% of its spread"
        )

    def run(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return answers_of(model, spec.name, batch)

    first = run(few)
    began = time.perf_counter()
    second = run(few)
    seconds = (time.perf_counter() - began) / len(first)
    if differ(first, second, SAME):
        raise UserError(
            "the model is not deterministic: it returned different answers to the same inputs"
        )
    folder = folder / content_digest(f"{model.source.digest} {spec.name} {inputs.digest}".encode())
    missing = len(inputs) - SHARD * len([*folder.glob("outputs-*.npy")])
    if seconds * missing > 60 * minutes:
        raise UserError(
            f"--minutes: answering {missing} inputs takes the model about "
            f"{seconds * missing / 60:.1f} minutes: give more minutes or fewer inputs"
        )
    outputs = finite_answers(run, inputs, folder)
    stated = (scores or "").rpartition(":")[2] if ":" in (scores or "") else ""
    found = TASKS[task].of(outputs[rows.train], stated, tolerance, cosine)
    return Teacher(model, spec, found, inputs, rows, outputs, seconds, folder)


def finite_answers(run: Run, inputs: Inputs, folder: Path) -> np.ndarray:
    """Return the model's answers to all inputs; files of them in the folder are reused.

    Raises:
        UserError: if some aren't finite.
    """
    outputs = all_answers(run, np.arange(len(inputs)), inputs.batch, folder / "outputs")
    if not np.isfinite(outputs).all():
        wrong = int((~np.isfinite(outputs).all(1)).sum())
        raise UserError(f"the model's answers to {wrong} inputs are not finite: leave these out")
    return outputs


def _proved(model: OpenModel, spec: TensorSpec, few: Mapping[str, np.ndarray]) -> str:
    """Return the task that the model's own file proves; UserError asks for one otherwise."""
    try:
        if can_be_scores(spec) and is_classifier(as_onnx(model, few), spec.name):
            return Classify.name
    except Exception:  # PyTorch's exporter and ONNX Runtime have many
        pass
    raise UserError(
        f"say what output {spec.name!r} {spec.shape} means, which the model's file does not "
        "prove: --task classify, labels, regress or embed"
    )


def all_answers(
    run: Run,
    rows: np.ndarray,
    batch: Callable[[np.ndarray], dict[str, np.ndarray]],
    path: Path,
) -> np.ndarray:
    """Return the model's answers (n, size) to rows, kept in files whose names begin with a path.

    `run` returns the answers to a batch, and `batch` the inputs of some of the rows.
    """
    parts = []
    label = f"model: {path.name}"
    with Progress(total=len(rows), desc=label, unit="input", file=sys.stderr) as bar:
        for begin in range(0, len(rows), SHARD):
            file = path.with_name(f"{path.name}-{begin:08}.npy")
            if not file.is_file():
                found = []
                for part in batches(rows[begin : begin + SHARD]):
                    found.append(run(batch(part)))
                    bar.update(len(part))
                content = io.BytesIO()
                np.save(content, np.concatenate(found).astype(np.float32))
                write_atomically(file, content.getvalue())
            parts.append(np.load(file))
    return np.concatenate(parts)
