"""Train a student to give the served model's answers (Hinton et al., 2015)."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from codedinvnet.common.config import PartSettings
from codedinvnet.common.errors import UserError
from codedinvnet.protection.measure import Answers, coverage_at
from codedinvnet.protection.students import Student
from codedinvnet.protection.teacher import Lesson, batches, shifted
from codedinvnet.training.part import PartStage, batch_places
from codedinvnet.training.precision import autocast

BY_HEART = 0.03
"""Images are pasted when agreement on an epoch's whole images exceeds the best validation by so
much, and by two standard errors."""
LEAST = 10
"""Steps without which there is no training."""
FEWEST_STEPS = 40
"""Steps of an epoch at least; an epoch goes through few inputs several times."""
MOST_STEPS, MOST_ROUNDS = 60_000, 400
"""A training ends here even if time is left: more changes nothing, or learns inputs by heart."""
HELD, LEAST_BATCH = 6 << 30, 16
"""Bytes that a step may keep for its gradients, and the smallest batch that is made for it."""
SHARE = 0.93
"""Part of the time that epochs are planned for; the rest is for slow moments of the machine."""


class Distillation(PartStage):
    """Train a student within a budget of seconds.

    Args:
        student: trained in place.
        lesson: what it is trained with.
        part: how to train.
        seconds: for all epochs; a machine that is slower than planned does fewer.
    """

    gradient_norm = 1.0

    def __init__(
        self, student: Student, lesson: Lesson, part: PartSettings, seconds: float
    ) -> None:
        super().__init__(student, part)
        self.student, self.lesson, self.seconds = student, lesson, seconds
        self.name = student.family
        self.precision = "bfloat16" if student.reduced else "float32"
        self.order = lesson.teacher.rows.train
        self.pasting, self.best = False, 0.0
        self.whole, self.agreed = 0, 0

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        super().start_epoch(epoch, generator)
        rows = self.lesson.teacher.rows.train
        self.order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        self.whole, self.agreed = 0, 0

    def batch_loss(self, index: int) -> Tensor:
        lesson, task = self.lesson, self.lesson.teacher.task
        rows = self.order[batch_places(self.order, index, self.part.batch_size).numpy()]
        weights = lesson.weights(self.pasting)
        ways = torch.multinomial(weights, len(rows), True, generator=self.generator).numpy()
        wanted = torch.from_numpy(lesson.targets[ways, rows])
        inputs = self.student.tensors(lesson.batch(rows, ways))
        if lesson.shift:
            inputs = [shifted(inputs[0], self.student.specs[0], lesson.shift, self.generator)]
        with autocast(self.precision, self.device):
            raw = self.student(*inputs).float()
        if (whole := ways == 0).any():
            self.whole += int(whole.sum())
            agrees = task.agree(self._values(raw)[whole], lesson.teacher.outputs[rows[whole]])
            self.agreed += int(agrees.sum())
        return task.loss(raw, wanted)

    @torch.no_grad()
    def _values(self, raw: Tensor) -> np.ndarray:
        return np.asarray(self.lesson.teacher.task.answer(raw)[0].numpy())

    def replan(self, done: int, seconds: float) -> int:
        """Return how many epochs there is time for, after some took so many seconds."""
        epochs = max(done, min(self.part.epochs, int(self.seconds * done / seconds)))
        self.total_steps = epochs * self.steps_per_epoch
        return epochs

    @torch.inference_mode()
    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by agreement with the model on the validation inputs."""
        rows, teacher = self.lesson.teacher.rows.validation, self.lesson.teacher
        self.student.eval()
        raw = [self.student.raw(teacher.inputs.batch(part)) for part in batches(rows)]
        values, sure = teacher.task.answer(torch.cat(raw))
        agrees = teacher.task.agree(values.numpy(), teacher.outputs[rows])
        found = Answers(sure.numpy(), agrees)
        agreement = float(found.agrees.mean())
        coverage = coverage_at(*found, 0.99)
        self.best = max(self.best, agreement)
        least = self.best + BY_HEART + len(rows) ** -0.5
        self.pasting |= self.agreed > least * self.whole
        return agreement, {"validation_agreement": agreement, "validation_coverage": coverage}


def _held(student: Student, lesson: Lesson) -> float:
    """Return how many bytes a step keeps for its gradients, for each query; weights don't count."""
    kept, rows = list[int](), lesson.teacher.rows.train[:2]
    weights = {weight.data_ptr() for weight in student.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept.append(tensor.nbytes)
        return tensor

    student.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(*student.tensors(lesson.teacher.inputs.batch(rows)))
    return sum(kept) / len(rows)


def plan(student: Student, lesson: Lesson, seconds: float) -> PartSettings:
    """Return a training that takes so many seconds, timed by a few steps that spoil the student."""
    count = len(lesson.teacher.rows.train)
    batch = 128 if count >= 4000 else 64 if count >= 1000 else 32
    held = _held(student, lesson)
    while batch > LEAST_BATCH and batch * held > HELD:
        batch //= 2
    steps = max(FEWEST_STEPS, count // batch)
    own = {"epochs": 1, "steps_per_epoch": steps, "batch_size": batch, **student.rates}
    part = PartSettings.model_validate(own)
    stage = Distillation(student, lesson, part, seconds)
    student.train()
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    stage.step(0, 0)
    began = time.monotonic()
    for index in range(1, 4):
        stage.step(0, index)
    step = (time.monotonic() - began) / 3
    began = time.monotonic()
    stage.validate()
    validation = time.monotonic() - began
    most = int((SHARE * seconds - validation) / step)
    if most < LEAST:
        raise UserError(
            f"--minutes: {LEAST} steps of {student.family} take about "
            f"{(LEAST * step + validation) / SHARE:.0f} seconds, and its share is "
            f"{max(0.0, seconds):.0f}: give more minutes"
        )
    if most < steps:
        return part.model_copy(update={"steps_per_epoch": most})
    epochs = int(SHARE * seconds / (steps * step + validation))
    rounds = max(1, min(MOST_STEPS // steps, MOST_ROUNDS * max(count, batch) // (steps * batch)))
    return part.model_copy(update={"epochs": max(1, min(epochs, rounds))})
