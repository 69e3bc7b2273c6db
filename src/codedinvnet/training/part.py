"""Training of one part of a method: a distilled classifier, a parity model, the paper's encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.erase import recovered_accuracy
from codedinvnet.codes.method import Batch, Given, Method
from codedinvnet.common.config import PartSettings, PixelFusionSettings, TrainSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource
from codedinvnet.models.checkpoint import PART, load_checkpoint
from codedinvnet.models.coded import prepare, with_encoder
from codedinvnet.training.fusion_data import FusionData, draw_groups, invert_means
from codedinvnet.training.loop import LAST, LATEST, Stage, differing_keys, train_stage
from codedinvnet.training.network import EVALUATION_BATCH, augment
from codedinvnet.training.pixels import PixelStage
from codedinvnet.training.precision import autocast

LARGEST_GRADIENT = 5.0
"""Norm of the gradients of losses of groups, which are large at first."""


@dataclass(frozen=True)
class TrainingData:
    """Images with their teacher's answers, and where the training is kept.

    Attributes:
        train: the images to train on.
        validation: those to validate on.
        logits: returns the teacher's logits of "train" or "validation", (N, classes) on the CPU.
        options: how the teacher was trained: augmentation, precision.
        seed: of the training.
        device: what to compute on.
        made_with: what the part depends on; see `Method.made_with`. Checkpoints state it.
        folder: where checkpoints go; None: nowhere.
    """

    train: ImageSource
    validation: ImageSource
    logits: Callable[[str], Tensor]
    options: TrainSettings
    seed: int
    device: torch.device
    made_with: Mapping[str, Any]
    folder: Path | None = None

    def run(self, stage: Stage, epochs: int) -> nn.Module:
        """Run a stage, or what is left of it, and return its part in evaluation mode.

        It starts over if the folder has a training with other settings.
        """
        part = stage.modules[PART]  # where the next command looks for it
        settings = self.made_with
        last = None if self.folder is None else self.folder / LAST
        going_on = last is not None and last.is_file()
        if going_on and last is not None:
            going_on = not differing_keys(load_checkpoint(last)[1]["settings"], settings)
        train_stage(
            stage,
            self.folder,
            epochs=epochs,
            seed=self.seed,
            settings=settings,
            resume=LATEST if going_on else 0,
        )
        return part.eval()


def batch_places(order: Sized, index: int, size: int) -> Tensor:
    """Return the places of an epoch's batch in its order, which is repeated as often as needed."""
    return (index * size + torch.arange(size)) % len(order)


class PartStage(Stage):
    """Train one module with AdamW.

    Args:
        module: the module that is trained, in place.
        part: how to train.
    """

    def __init__(self, module: nn.Module, part: PartSettings) -> None:
        self.module, self.part = module, part
        self.device = first_tensor(module).device
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=part.learning_rate, weight_decay=part.weight_decay
        )
        super().__init__(
            {PART: module},
            {"optimizer": optimizer},
            rate=part.learning_rate,
            epochs=part.epochs,
            steps_per_epoch=part.steps_per_epoch,
        )


@torch.no_grad()
def all_logits(classifier: nn.Module, source: ImageSource, *, description: str) -> Tensor:
    """Return the logits (N, classes), on the CPU, of a source, with a progress bar."""
    device = first_tensor(classifier).device
    parts = []
    rows = torch.arange(len(source)).split(EVALUATION_BATCH)
    for part in Progress(rows, desc=description, unit="batch", leave=False):
        logits: Tensor = classifier(source.batch(part)[0].to(device))
        parts.append(logits.float().cpu())
    return torch.cat(parts)


class LossStage(PartStage):
    """Train a part by a loss of images with the teacher's answers to them.

    Args:
        part: the module that is trained, in place.
        loss: maps what computes the part, in the training's precision, and a batch to a loss.
        data: the images, and the teacher's logits of them.
        budget: how to train.
        score: what the epoch is chosen by.
        members: images of a group; 1 trains on single images.

    Raises:
        UserError: if there are too few images for a group.
    """

    name = "part"

    def __init__(
        self,
        part: nn.Module,
        loss: Callable[[Callable[[Tensor], Tensor], Batch], Tensor],
        data: TrainingData,
        budget: PartSettings,
        score: Callable[[], float],
        members: int = 1,
    ) -> None:
        for words, there in (("training", data.train), ("validation", data.validation)):
            if len(there) < members:
                raise UserError(
                    f"groups of k={members} cannot be drawn from {len(there)} {words} images"
                )
        super().__init__(part, budget)
        self.loss, self.data, self.score, self.members = loss, data, score, members
        self.gradient_norm = None if members == 1 else LARGEST_GRADIENT
        self.varied = members == 1 or budget.augment
        self.order = torch.arange(len(data.train))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the images; an epoch goes round it as often as it must."""
        super().start_epoch(epoch, generator)
        self.order = torch.randperm(len(self.order), generator=generator)

    def batch(self, index: int) -> Batch:
        """Return the epoch's batch of this index."""
        groups = min(self.part.batch_size, len(self.order) // self.members)
        rows = self.order[batch_places(self.order, index, groups * self.members)]
        images, labels = self.data.train.batch(rows)
        x = prepare(images.to(self.device), 0)
        if self.varied:
            options = self.data.options
            x = augment(x, options.flip, options.shift, self.generator)
        parts = (x, self.data.logits("train")[rows], labels)
        found = (part.to(self.device).unflatten(0, (groups, self.members)) for part in parts)
        return Batch(*found)

    def batch_loss(self, index: int) -> Tensor:
        def computed(queries: Tensor) -> Tensor:
            with autocast(self.data.options.precision, self.device):
                outputs: Tensor = self.module(queries)
            return outputs.float()

        return self.loss(computed, self.batch(index))

    def validate(self) -> tuple[float, Mapping[str, float]]:
        accuracy = self.score()
        return accuracy, {"validation_accuracy": accuracy}


def train_classifier(part: nn.Module, data: TrainingData, budget: PartSettings) -> nn.Module:
    """Train a classifier of images on their labels alone, without a teacher."""
    nothing = torch.zeros(len(data.train), 0)
    data = replace(data, logits=lambda _: nothing)

    def score() -> float:
        logits = all_logits(part, data.validation, description="validation")
        return float((logits.argmax(1) == data.validation.labels).float().mean())

    def loss(computed: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(computed(batch.images.flatten(0, 1)), batch.labels.flatten())

    return data.run(LossStage(part, loss, data, budget, score), budget.epochs)


def train_part(method: Method, given: Given, data: TrainingData, budget: Any) -> nn.Module:
    """Train what a method needs around a classifier, and return it in evaluation mode.

    Args:
        method: by its own loss, or, with a `PixelFusionSettings`, by the paper's objective.
        given: what the method is made of, without a part.
        data: the images, with the classifier's answers to them.
        budget: how long and how to train.
    """
    torch.manual_seed(data.seed)
    part = method.untrained(given, data.made_with).to(data.device)
    scheme, k = method.build(replace(given, part=part)), given.k
    if isinstance(budget, PixelFusionSettings):
        model = with_encoder(given.coded, part)
        generator = torch.Generator().manual_seed(data.seed)
        groups = draw_groups(torch.arange(len(data.train)), budget.groups, k, generator)
        with Progress(total=len(groups), desc="fusion data", unit="group", leave=False) as bar:
            targets, _ = invert_means(
                model.network, data.train, groups, padding=model.padding, bar=bar
            )
        drawn = FusionData(groups, targets)
        paper = PixelStage(
            budget, data.train, model, drawn, data.validation, scheme, seed=data.seed, part=PART
        )
        return data.run(paper, budget.epochs)

    def score() -> float:
        return recovered_accuracy(scheme, data.validation, data.logits("validation"))

    members = k if scheme.rules.tasks(k)[k].encoded else 1
    return data.run(LossStage(part, method.loss, data, budget, score, members), budget.epochs)
