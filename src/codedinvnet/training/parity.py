"""What is trained on groups: ParM's parity model, and networks that answer for all members at once.

The parity model is distilled (Kosaian et al., SOSP 2019, section 3.3). Each step draws new groups;
the classifier's logits of all images are computed once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.config import PartSettings
from codedinvnet.data import ImageSource, random_groups
from codedinvnet.errors import UserError
from codedinvnet.models.coded import prepare
from codedinvnet.training.classifier import answers_to, distilled
from codedinvnet.training.network import augment
from codedinvnet.training.part import PartStage
from codedinvnet.training.precision import autocast

BATCH = 250
Answers: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Maps groups' images (B, k, C, H, W) to one or more answers for all members, logits
(B, k, classes)."""


class Taught(NamedTuple):
    """Images with the logits that the served classifier gives them."""

    source: ImageSource
    rows: Tensor
    """Rows of the source, (N,)."""
    logits: Tensor
    """(N, classes), on the CPU."""

    def groups(self, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, k, C, H, W) as floats, logits and labels of the images at places."""
        images, labels = self.source.batch(self.rows[places.flatten()])
        x = prepare(images.to(device), 0).unflatten(0, tuple(places.shape))
        return x, self.logits[places].to(device), labels.view_as(places).to(device)


class GroupStage(PartStage):
    """What training on freshly drawn groups of k has in common.

    Args:
        module: the module that is trained, in place.
        train: the training images.
        validation: the validation images.
        k: members of a group.
        part: how to train.

    Raises:
        UserError: if there are too few images for a group.
    """

    gradient_norm = 5.0

    def __init__(
        self, module: nn.Module, train: Taught, validation: Taught, k: int, part: PartSettings
    ) -> None:
        for words, there in (("training", train.rows), ("validation", validation.rows)):
            if len(there) < k:
                raise UserError(f"groups of k={k} cannot be drawn from {len(there)} {words} images")
        super().__init__(module, part)
        self.train, self.validation, self.k = train, validation, k

    @abstractmethod
    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of groups: images (B, k, C, H, W), logits (B, k, classes), labels."""

    @abstractmethod
    def decoded(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return every member's logits (B, k, classes) as if it alone were missing."""

    def batch_loss(self, index: int) -> Tensor:
        count = len(self.train.rows)
        size = min(self.part.batch_size, count // self.k)
        places = torch.randperm(count, generator=self.generator)[: size * self.k]
        return self.loss(*self.train.groups(places.view(size, self.k), self.device))

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by recovered accuracy in one fixed grouping of the validation images."""
        generator = torch.Generator().manual_seed(self.k)
        drawn = random_groups(len(self.validation.rows), self.k, generator)
        per_batch = max(1, BATCH // self.k)
        correct = 0
        batches = zip(drawn.members.split(per_batch), drawn.counted.split(per_batch), strict=True)
        for members, counted in batches:
            images, logits, labels = self.validation.groups(members, self.device)
            with torch.no_grad():
                hits = self.decoded(images, logits).argmax(2) == labels
            correct += int((hits.cpu() & counted).sum())
        accuracy = correct / len(self.validation.rows)
        return accuracy, {"validation_recovered": accuracy}


class ParityStage(GroupStage):
    """Train a parity model: its output on the parity image shall be the sum of the logits.

    The loss is the mean square of the difference, as in SOSP 2019.

    Args:
        parity_model: maps parity images (B, C, H, W) to sums of logits.
        encode: maps groups (B, k, C, H, W) to parity images.
        train: the training images.
        validation: the validation images.
        k: members of a group.
        part: how to train.
        flip: whether half of the images are mirrored, if `part.augment`.
        shift: the most pixels by which images are shifted, if `part.augment`.
    """

    name = "parity model"

    def __init__(
        self,
        parity_model: nn.Module,
        encode: Callable[[Tensor], Tensor],
        train: Taught,
        validation: Taught,
        k: int,
        part: PartSettings,
        *,
        flip: bool,
        shift: int,
    ) -> None:
        super().__init__(parity_model, train, validation, k, part)
        self.encode, self.flip, self.shift = encode, flip, shift

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if self.part.augment:
            views = augment(images.flatten(0, 1), self.flip, self.shift, self.generator)
            images = views.view_as(images)
        return F.mse_loss(self.module(self.encode(images)), logits.sum(dim=1))

    def decoded(self, images: Tensor, logits: Tensor) -> Tensor:
        # All members share one error: decoded y_i = P − Σ_{j≠i} y_j = y_i + (P − Σ y_j).
        error: Tensor = self.module(self.encode(images)) - logits.sum(dim=1)
        return logits + error[:, None]


class MembersStage(GroupStage):
    """Train what answers for every member of a group at once, on labels and on the served logits.

    The loss is that of a distilled classifier (`ClassifierStage`), over all members and answers.

    Args:
        module: the module that is trained, in place.
        answers: the first of its answers is the one that is served.
        train: the training images.
        validation: the validation images.
        k: members of a group.
        part: how to train.
        flip: whether half of the views are mirrored.
        shift: the most pixels by which views are shifted.
        precision: the precision of training passes, "float32" or "bfloat16".
        asked: the served classifier, if it is to answer the augmented images; else its logits of
            the images as they are count.
    """

    name = "all members"

    def __init__(
        self,
        module: nn.Module,
        answers: Answers,
        train: Taught,
        validation: Taught,
        k: int,
        part: PartSettings,
        *,
        flip: bool,
        shift: int,
        precision: str,
        asked: nn.Module | None = None,
    ) -> None:
        super().__init__(module, train, validation, k, part)
        self.asked = asked
        self.answers, self.flip, self.shift, self.precision = answers, flip, shift, precision

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        views = augment(images.flatten(0, 1), self.flip, self.shift, self.generator)
        with autocast(self.precision, self.device):
            found = self.answers(views.view_as(images))
        teacher = answers_to(self.asked, views, logits.flatten(0, 1))
        losses = []
        for answer in found:
            own = answer.float().flatten(0, 1)
            loss = F.cross_entropy(own, labels.flatten())
            losses.append(distilled(loss, own, teacher))
        return torch.stack(losses).sum()

    def decoded(self, images: Tensor, logits: Tensor) -> Tensor:
        return self.answers(images)[0]
