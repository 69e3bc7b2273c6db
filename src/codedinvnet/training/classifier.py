"""Plain classifiers: the base model of the rivals, and the small backup, distilled."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.common.config import PartSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource
from codedinvnet.models.coded import prepare
from codedinvnet.training.fitting import TrainingData
from codedinvnet.training.network import augment
from codedinvnet.training.part import PartStage, batch_places
from codedinvnet.training.precision import autocast

EVALUATION_BATCH = 250
DISTILLED_SHARE = 0.7
"""Of the loss: how far the small classifier follows its teacher rather than the labels."""


@torch.no_grad()
def all_logits(
    classifier: nn.Module, source: ImageSource, rows: Tensor, *, description: str
) -> Tensor:
    """Return the logits (N, classes), on the CPU, of some rows of a source, with a progress bar."""
    device = first_tensor(classifier).device
    parts = []
    bar = Progress(
        rows.split(EVALUATION_BATCH), desc=description, unit="batch", leave=False, file=sys.stderr
    )
    for part in bar:
        logits: Tensor = classifier(source.batch(part)[0].to(device))
        parts.append(logits.float().cpu())
    return torch.cat(parts)


def distilled(loss: Tensor, logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of logits (N, classes) that follow a teacher in addition to the labels."""
    soft = F.cross_entropy(logits, teacher.softmax(1))
    return DISTILLED_SHARE * soft + (1 - DISTILLED_SHARE) * loss


class ClassifierStage(PartStage):
    """Train a classifier on labels, and maybe on a teacher's answers.

    Args:
        classifier: maps images (B, C, H, W) to logits; it is trained in place.
        data: the images, and the teacher's logits of them.
        budget: how to train.
        distil: whether the teacher counts.
    """

    name = "classifier"

    def __init__(
        self,
        classifier: nn.Module,
        data: TrainingData,
        budget: PartSettings,
        *,
        distil: bool,
    ) -> None:
        super().__init__(classifier, budget)
        self.data, self.options = data, data.settings.training
        self.logits = data.logits("train") if distil else None
        self.order = torch.arange(len(data.train_rows))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the images; an epoch goes round it as often as it must."""
        super().start_epoch(epoch, generator)
        self.order = torch.randperm(len(self.order), generator=generator)

    def batch_loss(self, index: int) -> Tensor:
        chosen = self.order[batch_places(self.order, index, self.part.batch_size)]
        images, labels = self.data.images.batch(self.data.train_rows[chosen])
        x = prepare(images.to(self.device), 0)
        x = augment(x, self.options.flip, self.options.shift, self.generator)
        with autocast(self.options.precision, self.device):
            logits = self.module(x).float()
        loss = F.cross_entropy(logits, labels.to(self.device))
        if self.logits is not None:
            loss = distilled(loss, logits, self.logits[chosen].to(self.device))
        return loss

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by accuracy on the validation images."""
        images, rows = self.data.images, self.data.validation_rows
        logits = all_logits(self.module, images, rows, description="validation")
        labels = images.labels[rows]
        accuracy = float((logits.argmax(1) == labels).float().mean())
        return accuracy, {"validation_accuracy": accuracy}
