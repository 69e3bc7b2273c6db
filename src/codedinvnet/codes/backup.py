"""The backup: a plain classifier that answers for everybody, for each at 1/k of what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme, ScoresCode
from codedinvnet.codes.equal_cost import served_macs, width_within
from codedinvnet.codes.method import Batch, Given, Method
from codedinvnet.codes.rules import BACKUP, SMALL_BACKUP, AnswersAll, CodeRules, Costs
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import CodedModel
from codedinvnet.models.network import ImageNetwork
from codedinvnet.nn.resnet import ResNet

DISTILLED_SHARE = 0.7
"""Of the loss: how far the backup follows its teacher rather than the labels."""
BLOCKS, SQUEEZE = (1, 1, 1), 2
"""Shape of the small backup: at its cost, a shallow network at half size beats a thin deep one."""


def backup_network(model: CodedModel, width: int) -> ResNet:
    """Return an untrained small backup of a width, for padded images of a model."""
    return ResNet(
        model.input_shape[0],
        len(model.classes),
        width=width,
        blocks=BLOCKS,
        squeeze=SQUEEZE,
    )


def backup_width(model: CodedModel, k: int) -> int:
    """Return the width of the small backup: the largest that costs no more than 1/k of g(f(x))."""
    budget = served_macs(model) // k
    return width_within(lambda width: backup_network(model, width), model, budget)


class BackupCode(ScoresCode):
    """An extra task sends the backup's scores of its members, any of which it makes up for."""

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        task = self.rules.k + member % self.rules.r
        members = self.rules.tasks(size)[task].members
        scores = outputs[task]
        return scores.view(len(scores), len(members), -1)[:, members.index(member)]


class SmallBackup(Method):
    """The cheap rival of a code: no code, but a small classifier on the extra worker.

    It was distilled from the served one (Hinton et al., 2015, section 2) and costs about 1/k of it
    for each query, so that the extra worker does as much as the others.
    """

    name = SMALL_BACKUP
    part = "backup"

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        return AnswersAll(k, BACKUP, cost=Costs(member=1 / k))

    def made_with(self, given: Given, settings: Any) -> Mapping[str, Any]:
        return {"width": backup_width(given.coded, given.k)}

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        model = given.coded
        network = backup_network(model, int(made_with["width"]))
        return ImageNetwork(network, model.image_shape, model.padding)

    def loss(self, part: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        logits = part(batch.images.flatten(0, 1))
        soft = F.cross_entropy(logits, batch.logits.flatten(0, 1).softmax(1))
        hard = F.cross_entropy(logits, batch.labels.flatten())
        return DISTILLED_SHARE * soft + (1 - DISTILLED_SHARE) * hard

    def build(self, given: Given) -> Scheme:
        assert given.part is not None
        return self.scheme(BackupCode(self.rules(given.k)), given, **{BACKUP: given.part})
