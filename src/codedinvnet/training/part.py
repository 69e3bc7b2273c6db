"""Training of one part of a method: a distilled classifier, a parity model, the paper's encoder.

`TrainingData` is what `Method.fit` trains with. ParM's parity model is distilled (Kosaian et al.,
SOSP 2019, section 3.3).
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.common.config import PartSettings, PixelFusionSettings, TrainSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource
from codedinvnet.models.checkpoint import PART, load_checkpoint, module_tensors, save_checkpoint
from codedinvnet.models.coded import CodedModel, prepare
from codedinvnet.training.fusion_data import FusionData, draw_groups, invert_means
from codedinvnet.training.loop import BEST, LAST, LATEST, Stage, differing_keys, train_stage
from codedinvnet.training.network import EVALUATION_BATCH, augment
from codedinvnet.training.pixels import PixelStage
from codedinvnet.training.precision import autocast

if TYPE_CHECKING:
    from codedinvnet.codes.base import Scheme

DISTILLED_SHARE = 0.7
"""Of the loss: how far the small classifier follows its teacher rather than the labels."""


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

    def groups(self, split: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return groups of rows (G, k) of a split, "train" or "validation".

        They are images (G, k, C, H, W) as floats, the teacher's logits (G, k, classes), and labels.
        """
        source = self.train if split == "train" else self.validation
        images, labels = source.batch(rows.flatten())
        x = prepare(images.to(self.device), 0).unflatten(0, tuple(rows.shape))
        logits = self.logits(split)[rows].to(self.device)
        return x, logits, labels.view_as(rows).to(self.device)

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

    def fit_classifier(
        self, part: nn.Module, budget: PartSettings, *, distil: bool = True
    ) -> nn.Module:
        """Train a classifier of images by `ClassifierStage`."""
        return self.run(ClassifierStage(part, self, budget, distil=distil), budget.epochs)

    def fit_parity(self, part: nn.Module, scheme: Scheme, budget: PartSettings) -> nn.Module:
        """Train a parity model, which the scheme has, by `ParityStage`."""
        return self.run(ParityStage(part, scheme, self, budget), budget.epochs)

    def fit_paper(
        self, model: CodedModel, scheme: Scheme, budget: PixelFusionSettings
    ) -> nn.Module:
        """Train E of a model, which the scheme has, by the paper's objective."""
        generator = torch.Generator().manual_seed(self.seed)
        groups = draw_groups(
            torch.arange(len(self.train)), budget.groups, scheme.rules.k, generator
        )
        padding = model.padding
        with Progress(total=len(groups), desc="fusion data", unit="group", leave=False) as bar:
            targets, _ = invert_means(model.network, self.train, groups, padding=padding, bar=bar)
        drawn = FusionData(groups, targets)
        stage = PixelStage(
            budget, self.train, model, drawn, self.validation, scheme, seed=self.seed, part=PART
        )
        return self.run(stage, budget.epochs)

    def keep(self, part: nn.Module, seconds: float) -> None:
        """Write the checkpoints of a part that was trained without `run`, as finished."""
        assert self.folder is not None
        header = {"settings": dict(self.made_with), "epoch": sys.maxsize, "seconds": seconds}
        for name in (LAST, BEST):
            save_checkpoint(self.folder / name, module_tensors({PART: part}), header)


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
    bar = Progress(
        torch.arange(len(source)).split(EVALUATION_BATCH),
        desc=description,
        unit="batch",
        leave=False,
        file=sys.stderr,
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
        self.data, self.options = data, data.options
        self.logits = data.logits("train") if distil else None
        self.order = torch.arange(len(data.train))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the images; an epoch goes round it as often as it must."""
        super().start_epoch(epoch, generator)
        self.order = torch.randperm(len(self.order), generator=generator)

    def batch_loss(self, index: int) -> Tensor:
        chosen = self.order[batch_places(self.order, index, self.part.batch_size)]
        images, labels = self.data.train.batch(chosen)
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
        source = self.data.validation
        logits = all_logits(self.module, source, description="validation")
        accuracy = float((logits.argmax(1) == source.labels).float().mean())
        return accuracy, {"validation_accuracy": accuracy}


class GroupStage(PartStage):
    """What training on freshly drawn groups has in common.

    Args:
        module: the module that is trained, in place.
        scheme: the code that serves it, by which it is validated.
        data: the images, and the teacher's logits of them.
        budget: how to train.

    Raises:
        UserError: if there are too few images for a group.
    """

    gradient_norm = 5.0

    def __init__(
        self, module: nn.Module, scheme: Scheme, data: TrainingData, budget: PartSettings
    ) -> None:
        k = scheme.rules.k
        for words, there in (("training", data.train), ("validation", data.validation)):
            if len(there) < k:
                raise UserError(f"groups of k={k} cannot be drawn from {len(there)} {words} images")
        super().__init__(module, budget)
        self.scheme, self.data, self.k = scheme, data, k

    @abstractmethod
    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of groups: images (B, k, C, H, W), logits (B, k, classes), labels."""

    def augmented(self, images: Tensor) -> Tensor:
        """Return images (B, k, C, H, W) mirrored and shifted as the teacher's training's were."""
        options = self.data.options
        views = augment(images.flatten(0, 1), options.flip, options.shift, self.generator)
        return views.view_as(images)

    def batch_loss(self, index: int) -> Tensor:
        count = len(self.data.train)
        size = min(self.part.batch_size, count // self.k)
        rows = torch.randperm(count, generator=self.generator)[: size * self.k]
        return self.loss(*self.data.groups("train", rows.view(size, self.k)))

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by recovered accuracy in one fixed grouping of the validation images."""
        own = self.data.logits("validation")
        accuracy = self.scheme.recovered_accuracy(self.data.validation, own)
        return accuracy, {"validation_recovered": accuracy}


class ParityStage(GroupStage):
    """Train a parity model: its output on the parity image shall be the sum of the logits.

    The loss is the mean square of the difference, as in SOSP 2019. The code encodes; with
    `budget.augment` images are mirrored and shifted.
    """

    name = "parity model"

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if self.part.augment:
            images = self.augmented(images)
        query = self.scheme.code.encode(self.k, images).query
        return F.mse_loss(self.module(query), logits.sum(dim=1))
