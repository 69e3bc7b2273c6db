"""What is trained on groups: ParM's parity model, and networks that answer for all members at once.

The parity model is distilled (Kosaian et al., SOSP 2019, section 3.3). Each step draws new groups;
the classifier's logits of all images are computed once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.erase import recovered_accuracy
from codedinvnet.common.config import PartSettings
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageRows
from codedinvnet.training.classifier import distilled
from codedinvnet.training.fitting import TrainingData
from codedinvnet.training.network import augment
from codedinvnet.training.part import PartStage
from codedinvnet.training.precision import autocast


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
        for words, there in (("training", data.train_rows), ("validation", data.validation_rows)):
            if len(there) < k:
                raise UserError(f"groups of k={k} cannot be drawn from {len(there)} {words} images")
        super().__init__(module, budget)
        self.scheme, self.data, self.k = scheme, data, k

    @abstractmethod
    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of groups: images (B, k, C, H, W), logits (B, k, classes), labels."""

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
        images = ImageRows(self.data.images, self.data.validation_rows, "the validation images")
        accuracy = recovered_accuracy(self.scheme, images, self.data.logits("validation"))
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


class MembersStage(GroupStage):
    """Train a network that answers for every member of a group at once, on labels and a teacher.

    It maps groups (B, k, C, H, W) to logits (B, k, classes). The loss is that of a distilled
    classifier (`ClassifierStage`), over all members. A step sees as many images as a classifier's,
    which are 1/k as many groups.
    """

    name = "all members"

    def __init__(
        self, module: nn.Module, scheme: Scheme, data: TrainingData, budget: PartSettings
    ) -> None:
        groups = max(2, budget.batch_size // scheme.rules.k)
        super().__init__(module, scheme, data, budget.model_copy(update={"batch_size": groups}))

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.data.settings.training.precision, self.device):
            own: Tensor = self.module(self.augmented(images))
        own = own.float().flatten(0, 1)
        return distilled(F.cross_entropy(own, labels.flatten()), own, logits.flatten(0, 1))
