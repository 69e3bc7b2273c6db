"""The training of a small backup by the served model's scores, within a budget of minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.config import PartSettings
from codedinvnet.errors import UserError
from codedinvnet.protect.inputs import Inputs
from codedinvnet.protect.students import Student, tensors
from codedinvnet.training.network import augment
from codedinvnet.training.part import PartStage
from codedinvnet.training.precision import autocast, computes_bfloat16

TEMPERATURE = 2.0
"""By which scores are divided before they are compared: so more than one class counts."""
FEWEST_STEPS = 40
"""Steps of an epoch; one of few inputs goes round them several times."""
MOST_STEPS, MOST_ROUNDS = 60_000, 400
"""A training ends here, though there be time: more changes nothing, or learns inputs by heart."""
SHARE = 0.85
"""Of the time that is left, the part that epochs are planned for."""


@dataclass(frozen=True)
class Lesson:
    """What a student is trained with.

    Attributes:
        inputs: all queries.
        train: rows to train on.
        validation: rows to score on.
        teacher: log-probabilities (N, classes) of all rows.
        mirrored: likewise of the mirrored images; None if they are not mirrored, or as `teacher`.
        flip: mirror half of the images.
        shift: shift images by up to so many pixels.
    """

    inputs: Inputs
    train: np.ndarray
    validation: np.ndarray
    teacher: np.ndarray
    mirrored: np.ndarray | None = None
    flip: bool = False
    shift: int = 0


class DistilStage(PartStage):
    """Train a student to give the teacher's probabilities.

    Args:
        student: trained in place.
        lesson: its inputs, and the teacher's answers.
        part: how to train.
        seconds: for all epochs; fewer are done if the machine is slower than was planned.
    """

    name = "small backup"
    gradient_norm = 1.0

    def __init__(
        self, student: Student, lesson: Lesson, part: PartSettings, seconds: float = math.inf
    ) -> None:
        super().__init__(student, part)
        self.seconds = seconds
        self.student, self.lesson = student, lesson
        images = student.shape.kind == "images"
        self.last = images and student.last
        reduced = student.shape.kind != "vectors" and computes_bfloat16("cpu")
        self.precision = "bfloat16" if reduced else "float32"
        self.order = lesson.train

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the inputs; an epoch goes round it as often as it must."""
        super().start_epoch(epoch, generator)
        self.order = self.lesson.train[torch.randperm(len(self.order), generator=generator).numpy()]

    def batch_loss(self, index: int) -> Tensor:
        size, lesson = self.part.batch_size, self.lesson
        rows = self.order[(index * size + np.arange(size)) % len(self.order)]
        inputs = tensors(self.student.shape, lesson.inputs.batch(rows))
        wanted = lesson.teacher[rows]
        if lesson.flip or lesson.shift:
            (images,) = inputs
            images = images.permute(0, 3, 1, 2) if self.last else images
            if lesson.flip:
                turned = torch.rand(size, generator=self.generator) < 0.5
                images = torch.where(turned[:, None, None, None], images.flip(3), images)
                if lesson.mirrored is not None:
                    wanted = np.where(turned.numpy()[:, None], lesson.mirrored[rows], wanted)
            images = augment(images, False, lesson.shift, self.generator)
            inputs = [images.permute(0, 2, 3, 1) if self.last else images]
        with autocast(self.precision, self.device):
            logits = self.module(*inputs).float()
        soft = (torch.from_numpy(wanted) / TEMPERATURE).softmax(1)
        loss = F.cross_entropy(logits / TEMPERATURE, soft)
        return loss * TEMPERATURE**2

    def replan(self, done: int, seconds: float) -> int:
        """Return the number of epochs that there is time for, and end the schedule with them.

        Args:
            done: epochs that were done, at least one.
            seconds: that they took.
        """
        epochs = self.part.epochs
        if seconds / done * epochs > self.seconds:
            epochs = max(done, min(epochs, int(self.seconds * done / seconds)))
        self.total_steps = epochs * self.steps_per_epoch
        return epochs

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by agreement with the teacher on the validation inputs."""
        rows = self.lesson.validation
        answers = student_scores(self.student, self.lesson.inputs, rows).argmax(1)
        agreement = float((answers == self.lesson.teacher[rows].argmax(1)).mean())
        return agreement, {"validation_agreement": agreement}


@torch.inference_mode()
def student_scores(student: Student, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
    """Return a student's logits (B, classes) of some inputs."""
    student.eval()
    parts = np.split(rows, range(250, len(rows), 250))
    found = [student(*tensors(student.shape, inputs.batch(part))).float() for part in parts]
    return np.asarray(torch.cat(found).numpy())


def plan(student: Student, lesson: Lesson, seconds: float) -> PartSettings:
    """Return a training that takes so many seconds on this machine, by some steps of a copy.

    Args:
        student: an untrained one, which is spoilt.
        lesson: its inputs.
        seconds: that there are.

    Raises:
        UserError: if there is no time for an epoch.
    """
    count = len(lesson.train)
    batch = 128 if count >= 4000 else 64 if count >= 1000 else 32
    steps = max(FEWEST_STEPS, count // batch)
    part = PartSettings(epochs=1, steps_per_epoch=steps, batch_size=batch)
    stage = DistilStage(student, lesson, part)
    student.train()
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    for index in range(3):
        stage.step(0, index)
    began = time.monotonic()
    for index in range(10):
        stage.step(0, index)
    step = (time.monotonic() - began) / 10
    began = time.monotonic()
    stage.validate()
    epoch = steps * step + time.monotonic() - began
    epochs = int(SHARE * seconds / epoch)
    if epochs < 1:
        raise UserError(
            f"--minutes: an epoch of the small backup takes about {epoch / 60:.1f} minutes, and "
            f"{max(0.0, seconds) / 60:.1f} are left after the model was asked: give more"
        )
    most = max(1, min(MOST_STEPS // steps, MOST_ROUNDS * max(count, batch) // (steps * batch)))
    return part.model_copy(update={"epochs": min(epochs, most)})
