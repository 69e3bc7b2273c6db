"""The training of a small backup by the served model's scores, within a budget of minutes."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.config import PartSettings
from codedinvnet.errors import UserError
from codedinvnet.protect.inputs import Inputs
from codedinvnet.protect.students import Student, tensors
from codedinvnet.training.network import augment
from codedinvnet.training.part import PartStage, batch_places
from codedinvnet.training.precision import autocast, computes_bfloat16

TEMPERATURES = (2.0, 1.5, 1.0)
"""By which scores are divided before they are compared: so more than one class counts."""
MOST_ENTROPY = 2.0
"""Nats, on average: above it, a thousand classes look alike, and a student learns less of each."""
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
        validation: rows to score on, in random order: consecutive ones are a group of a code.
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

    @cached_property
    def temperature(self) -> float:
        """The largest of TEMPERATURES at which the teacher's answers are not too much alike."""
        logs = torch.from_numpy(self.teacher[self.train])
        for found in TEMPERATURES:
            logs_then = (logs / found).log_softmax(1)
            if float(-(logs_then.exp() * logs_then).sum(1).mean()) <= MOST_ENTROPY:
                break
        return found


class BudgetStage(PartStage):
    """Train something with the teacher's answers within a budget of seconds.

    Args:
        module: trained in place.
        lesson: its inputs, and the teacher's answers.
        part: how to train.
        seconds: for all epochs; fewer are done if the machine is slower than was planned.
        reduced: compute in bfloat16 where that is faster.
    """

    gradient_norm = 1.0

    def __init__(
        self, module: nn.Module, lesson: Lesson, part: PartSettings, seconds: float, reduced: bool
    ) -> None:
        super().__init__(module, part)
        self.lesson, self.seconds = lesson, seconds
        self.precision = "bfloat16" if reduced and computes_bfloat16("cpu") else "float32"
        self.order = lesson.train

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the inputs; an epoch goes round it as often as it must."""
        super().start_epoch(epoch, generator)
        self.order = self.lesson.train[torch.randperm(len(self.order), generator=generator).numpy()]

    def rows(self, index: int) -> np.ndarray:
        """Return the rows of the epoch's batch of this index."""
        places = batch_places(self.order, index, self.part.batch_size)
        found: np.ndarray = self.order[places.numpy()]
        return found

    def mirrored(
        self, images: Tensor, wanted: np.ndarray, rows: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Mirror half of the images (B, C, H, W), and return the teacher's answers to them."""
        turned = torch.rand(len(images), generator=self.generator) < 0.5
        images = torch.where(turned[:, None, None, None], images.flip(3), images)
        if self.lesson.mirrored is not None:
            wanted = np.where(turned.numpy()[:, None], self.lesson.mirrored[rows], wanted)
        return images, wanted

    def replan(self, done: int, seconds: float) -> int:
        """Return the number of epochs that there is time for, and end the schedule with them.

        Args:
            done: how many epochs were done, at least one.
            seconds: how long these epochs took.
        """
        epochs = self.part.epochs
        if seconds / done * epochs > self.seconds:
            epochs = max(done, min(epochs, int(self.seconds * done / seconds)))
        self.total_steps = epochs * self.steps_per_epoch
        return epochs

    @abstractmethod
    def agreement(self) -> float:
        """Return how often the answers to the validation inputs are the teacher's."""

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by agreement with the teacher on the validation inputs."""
        agreement = self.agreement()
        return agreement, {"validation_agreement": agreement}


class DistilStage(BudgetStage):
    """Train a student to give the teacher's probabilities."""

    def __init__(
        self, student: Student, lesson: Lesson, part: PartSettings, seconds: float = math.inf
    ) -> None:
        super().__init__(student, lesson, part, seconds, student.reduced)
        self.student, self.name = student, student.title

    def batch_loss(self, index: int) -> Tensor:
        lesson, rows = self.lesson, self.rows(index)
        inputs = tensors(self.student.shape, lesson.inputs.batch(rows))
        wanted = lesson.teacher[rows]
        if lesson.flip or lesson.shift:
            (images,) = inputs
            images = images.permute(0, 3, 1, 2) if self.student.last else images
            if lesson.flip:
                images, wanted = self.mirrored(images, wanted, rows)
            images = augment(images, False, lesson.shift, self.generator)
            inputs = [images.permute(0, 2, 3, 1) if self.student.last else images]
        with autocast(self.precision, self.device):
            logits = self.module(*inputs).float()
        temperature = lesson.temperature
        soft = (torch.from_numpy(wanted) / temperature).softmax(1)
        loss = F.cross_entropy(logits / temperature, soft)
        return loss * temperature**2

    def agreement(self) -> float:
        rows = self.lesson.validation
        answers = student_scores(self.student, self.lesson.inputs, rows).argmax(1)
        return float((answers == self.lesson.teacher[rows].argmax(1)).mean())


@torch.inference_mode()
def student_scores(student: Student, inputs: Inputs, rows: np.ndarray) -> np.ndarray:
    """Return a student's logits (B, classes) of some inputs."""
    student.eval()
    parts = np.split(rows, range(250, len(rows), 250))
    found = [student(*tensors(student.shape, inputs.batch(part))).float() for part in parts]
    return np.asarray(torch.cat(found).numpy())


def batch_size(count: int) -> int:
    """Return the batch with which so many inputs are trained on."""
    return 128 if count >= 4000 else 64 if count >= 1000 else 32


def plan(
    make: Callable[[PartSettings], BudgetStage],
    count: int,
    seconds: float,
    rates: Mapping[str, float],
) -> PartSettings:
    """Return a training that takes so many seconds on this machine, by some steps of a copy.

    Args:
        make: makes a stage, which is spoilt.
        count: inputs to train with.
        seconds: how many seconds there are.
        rates: the learning rate and weight decay, where they are not the usual ones.

    Raises:
        UserError: if there is no time for an epoch.
    """
    batch = batch_size(count)
    steps = max(FEWEST_STEPS, count // batch)
    own = {"epochs": 1, "steps_per_epoch": steps, "batch_size": batch, **rates}
    part = PartSettings.model_validate(own)
    stage = make(part)
    stage.module.train()
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
            f"--minutes: an epoch of the {stage.name} takes about {epoch / 60:.1f} minutes, and "
            f"{max(0.0, seconds) / 60:.1f} are left: give more"
        )
    rounds = max(1, min(MOST_STEPS // steps, MOST_ROUNDS * max(count, batch) // (steps * batch)))
    return part.model_copy(update={"epochs": min(epochs, rounds)})
