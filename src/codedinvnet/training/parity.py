"""What is trained on groups: ParM's parity model, and networks that answer for all members at once.

The parity model is distilled (Kosaian et al., SOSP 2019, section 3.3). Each step draws new groups;
the classifier's logits of all images are computed once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.common.config import PartSettings
from codedinvnet.common.errors import UserError
from codedinvnet.data import random_groups
from codedinvnet.training.classifier import answers_to, distilled
from codedinvnet.training.fitting import TrainingData
from codedinvnet.training.network import augment
from codedinvnet.training.part import PartStage
from codedinvnet.training.precision import autocast

BATCH = 250


class GroupStage(PartStage):
    """What training on freshly drawn groups of k has in common.

    Args:
        module: the module that is trained, in place.
        data: the images, and the teacher's logits of them.
        k: members of a group.
        budget: how to train.

    Raises:
        UserError: if there are too few images for a group.
    """

    gradient_norm = 5.0

    def __init__(self, module: nn.Module, data: TrainingData, k: int, budget: PartSettings) -> None:
        for words, there in (("training", data.train_rows), ("validation", data.validation_rows)):
            if len(there) < k:
                raise UserError(f"groups of k={k} cannot be drawn from {len(there)} {words} images")
        super().__init__(module, budget)
        self.data, self.k = data, k

    @abstractmethod
    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of groups: images (B, k, C, H, W), logits (B, k, classes), labels."""

    @abstractmethod
    def decoded(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return every member's logits (B, k, classes) as if it alone were missing."""

    def augmented(self, images: Tensor) -> Tensor:
        """Return images (B, k, C, H, W) mirrored and shifted as the teacher's training's were."""
        options = self.data.settings.training
        views = augment(images.flatten(0, 1), options.flip, options.shift, self.generator)
        return views.view_as(images)

    def batch_loss(self, index: int) -> Tensor:
        count = len(self.data.train_rows)
        size = min(self.part.batch_size, count // self.k)
        places = torch.randperm(count, generator=self.generator)[: size * self.k]
        return self.loss(*self.data.groups("train", places.view(size, self.k)))

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by recovered accuracy in one fixed grouping of the validation images."""
        generator = torch.Generator().manual_seed(self.k)
        total = len(self.data.validation_rows)
        drawn = random_groups(total, self.k, generator)
        per_batch = max(1, BATCH // self.k)
        correct = 0
        batches = zip(drawn.members.split(per_batch), drawn.counted.split(per_batch), strict=True)
        for members, counted in batches:
            images, logits, labels = self.data.groups("validation", members)
            with torch.no_grad():
                hits = self.decoded(images, logits).argmax(2) == labels
            correct += int((hits.cpu() & counted).sum())
        return correct / total, {"validation_recovered": correct / total}


class ParityStage(GroupStage):
    """Train a parity model: its output on the parity image shall be the sum of the logits.

    The loss is the mean square of the difference, as in SOSP 2019.

    Args:
        parity_model: maps parity images (B, C, H, W) to sums of logits.
        encode: maps groups (B, k, C, H, W) to parity images.
        data: the images, and the teacher's logits of them.
        k: members of a group.
        budget: how to train; with `augment` images are mirrored and shifted.
    """

    name = "parity model"

    def __init__(
        self,
        parity_model: nn.Module,
        encode: Callable[[Tensor], Tensor],
        data: TrainingData,
        k: int,
        budget: PartSettings,
    ) -> None:
        super().__init__(parity_model, data, k, budget)
        self.encode = encode

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if self.part.augment:
            images = self.augmented(images)
        return F.mse_loss(self.module(self.encode(images)), logits.sum(dim=1))

    def decoded(self, images: Tensor, logits: Tensor) -> Tensor:
        # All members share one error: decoded y_i = P − Σ_{j≠i} y_j = y_i + (P − Σ y_j).
        error: Tensor = self.module(self.encode(images)) - logits.sum(dim=1)
        return logits + error[:, None]


class MembersStage(GroupStage):
    """Train a network that answers for every member of a group at once, on labels and a teacher.

    The loss is that of a distilled classifier (`ClassifierStage`), over all members. A step sees as
    many images as a classifier's, which are 1/k as many groups.

    Args:
        network: maps groups (B, k, C, H, W) to logits (B, k, classes); it is trained in place.
        data: the images, and the teacher's logits of them.
        k: members of a group.
        budget: how to train a classifier.
        teacher: maps images (B, C, H, W) to logits; asked if `budget.consistent_teacher`.
    """

    name = "all members"

    def __init__(
        self,
        network: nn.Module,
        data: TrainingData,
        k: int,
        budget: PartSettings,
        teacher: nn.Module,
    ) -> None:
        groups = max(2, budget.batch_size // k)
        super().__init__(network, data, k, budget.model_copy(update={"batch_size": groups}))
        self.asked = teacher if budget.consistent_teacher else None

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        views = self.augmented(images)
        with autocast(self.data.settings.training.precision, self.device):
            own: Tensor = self.module(views)
        teacher = answers_to(self.asked, views.flatten(0, 1), logits.flatten(0, 1))
        own = own.float().flatten(0, 1)
        return distilled(F.cross_entropy(own, labels.flatten()), own, teacher)

    def decoded(self, images: Tensor, logits: Tensor) -> Tensor:
        found: Tensor = self.module(images)
        return found
