"""The served model as a teacher: its scores of all inputs, computed once and kept on disk."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from codedinvnet.common.errors import UserError
from codedinvnet.common.files import content_digest, write_atomically
from codedinvnet.common.progress import Progress
from codedinvnet.models import OpenModel
from codedinvnet.models.base import DATATYPES, Model, can_be_scores, scores_tensor
from codedinvnet.models.probe import kind_of_scores
from codedinvnet.protect.confidence import log_probabilities
from codedinvnet.protect.inputs import Inputs, Split, image_size, layout
from codedinvnet.training.network import augment

BATCH, SHARD = 32, 2048
"""Inputs of one call, and of one file of scores: what a kill costs at most."""
TWICE = 16
"""Inputs that the model answers twice, to check that it is deterministic."""
SAME = 1e-2
"""Two answers to one query may differ by this share of the largest score."""
CHANGED, STEADY = 256, 0.9
"""Images are mirrored or shifted in training if the model keeps this share of its answers to so
many changed images."""
MIRRORED_SHARE = 0.25
"""Share of the minutes that scoring the mirrored images may take."""

Change = Callable[[np.ndarray], np.ndarray]
"""Changes a batch of images."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A served classifier with its scores of all inputs.

    Attributes:
        model: the served model.
        inputs: distinct queries.
        rows: their split.
        scores: the model's, (N, classes).
        folder: keeps scores and checkpoints until the protection is finished.
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

    def spread(self, count: int) -> np.ndarray:
        """Return so many training rows, evenly spread: the first ones may be of few classes."""
        rows = self.rows.train
        found: np.ndarray = rows[
            np.arange(min(count, len(rows))) * len(rows) // min(count, len(rows))
        ]
        return found

    def agreement_when(self, change: Change) -> float:
        """Return the share of images whose answer stays the same when they are changed."""
        rows = self.spread(CHANGED)
        hits = []
        for part in np.split(rows, range(BATCH, len(rows), BATCH)):
            batch = {
                name: np.ascontiguousarray(change(array))
                for name, array in self.inputs.batch(part).items()
            }
            hits.append(scores_of(self.model, batch).argmax(1) == self.answers[part])
        return float(np.concatenate(hits).mean())

    def mirrored(self, seconds: float) -> np.ndarray | None:
        """Return log-probabilities (N, classes) of the mirrored images.

        None if the model would take longer than so many seconds for all of them.
        """
        kept = any(self.folder.glob("mirrored-*"))
        if not kept and query_seconds(self.model, self.inputs) * len(self.inputs) > seconds:
            return None
        scores = all_scores(self.model, self.inputs, self.folder, self.mirror)
        return log_probabilities(scores, self.kind)

    def mirror(self, batch: np.ndarray) -> np.ndarray:
        """Mirror a batch of images, left to right."""
        return np.flip(batch, 2 if layout(self.inputs.specs[0])[1] else 3)

    def shift(self, pixels: int) -> Change:
        """Return what shifts images by up to so many pixels, as training does."""
        last = layout(self.inputs.specs[0])[1]
        generator = torch.Generator().manual_seed(0)

        def change(batch: np.ndarray) -> np.ndarray:
            images = torch.from_numpy(batch)
            images = images.permute(0, 3, 1, 2) if last else images
            images = augment(images, False, pixels, generator)
            return (images.permute(0, 2, 3, 1) if last else images).numpy()

        return change

    def largest_shift(self) -> int:
        """Return an eighth of the images' height if the model tolerates such shifts, else 0."""
        pixels = image_size(self.inputs.specs[0])[0] // 8
        if pixels < 2 or self.agreement_when(self.shift(pixels)) < STEADY:
            return 0
        return pixels


def scores_of(model: Model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the scores (B, classes) of a batch."""
    assert model.signature.scores is not None
    return model.run(batch)[model.signature.scores.output]


def check_classifier(model: OpenModel) -> None:
    """Refuse what is no classifier of numbers.

    Raises:
        UserError: saying what is supported.
    """
    signature, name = model.signature, model.source.source
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
    """Have the model score all inputs.

    Args:
        model: the served model.
        inputs: distinct queries.
        rows: their split.
        folder: keeps what is not finished.
        minutes: the most that it may take.

    Raises:
        UserError: if it takes longer, or its scores cannot be learnt from.
    """
    spec = scores_tensor(model.signature)
    name = content_digest(spec.name.encode())
    folder = folder / f"scores-{model.source.digest}-{name}-{inputs.digest()}"
    missing = sum(
        min(SHARD, len(inputs) - begin)
        for begin, path in _shards(folder, "scores", len(inputs)).items()
        if not path.is_file()
    )
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
    """Return the seconds of one query in a batch; check that the model is deterministic.

    Raises:
        UserError: if it is not, or its scores are not finite.
    """
    batch = inputs.batch(np.arange(min(TWICE, len(inputs))))
    first = scores_of(model, batch)
    began = time.perf_counter()
    second = scores_of(model, batch)
    seconds = (time.perf_counter() - began) / len(first)
    if not np.isfinite(first).all():
        raise UserError("the model's scores of the first inputs are not finite")
    if _differ(first, second):
        raise UserError(
            "the model is not deterministic: it returned different scores for the same inputs"
        )
    return seconds


def all_scores(
    model: Model, inputs: Inputs, folder: Path, change: Change | None = None
) -> np.ndarray:
    """Return the model's scores (N, classes) of all inputs; finished files of them are reused.

    Args:
        model: the served model.
        inputs: the queries.
        folder: of the files.
        change: made to images first.

    Raises:
        UserError: if scores are not finite, or differ from those that were kept.
    """

    def scores(rows: np.ndarray) -> np.ndarray:
        batch = inputs.batch(rows)
        if change is not None:
            batch = {key: np.ascontiguousarray(change(array)) for key, array in batch.items()}
        return scores_of(model, batch).astype(np.float32)

    parts = []
    name = "scores" if change is None else "mirrored"
    with Progress(total=len(inputs), desc=f"model: {name}", unit="input", file=sys.stderr) as bar:
        for begin, path in _shards(folder, name, len(inputs)).items():
            rows = np.arange(begin, min(begin + SHARD, len(inputs)))
            if path.is_file():
                found = np.load(path)
                if _differ(found[:TWICE], scores(rows[:TWICE])):  # a server may have new weights
                    raise UserError(
                        f"--out: the model's scores differ from those kept in {folder.parent}: "
                        f"name another folder, or delete {folder.parent}"
                    )
                bar.update(len(rows))
            else:
                batches = np.split(rows, range(BATCH, len(rows), BATCH))
                found = np.concatenate([_counted(bar, scores(part)) for part in batches])
                if not np.isfinite(found).all():
                    raise UserError(
                        f"the model's scores of some inputs from {begin} on are not finite"
                    )
                content = io.BytesIO()
                np.save(content, found)
                write_atomically(path, content.getvalue())
            parts.append(found)
    return np.concatenate(parts)


def _counted(bar: Progress, scores: np.ndarray) -> np.ndarray:
    bar.update(len(scores))
    return scores


def _shards(folder: Path, name: str, count: int) -> dict[int, Path]:
    """Return the files of scores, by the first row of each."""
    return {begin: folder / f"{name}-{begin:08}.npy" for begin in range(0, count, SHARD)}


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    return not np.abs(one - other).max() <= SAME * max(float(np.abs(one).max()), 1e-6)


def check_scores(scores: np.ndarray, output: str, *, stated: bool) -> None:
    """Refuse scores that cannot be learnt from.

    Args:
        scores: (N, classes).
        output: the name of the output.
        stated: whether the user named it as class scores.

    Raises:
        UserError: if they are constant, or look like labels or an embedding.
    """
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
