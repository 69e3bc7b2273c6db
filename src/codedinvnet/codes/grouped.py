"""What methods share whose extra worker runs one network on a whole group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from codedinvnet.codes.backup import BackupCode
from codedinvnet.codes.base import Encoded, Scheme
from codedinvnet.codes.equal_cost import count_macs, served_macs
from codedinvnet.codes.method import ONE, Given, Method, Tolerance
from codedinvnet.codes.rules import PARITY_MODEL, AnswersAll, CodeRules, Costs
from codedinvnet.common.config import PartSettings
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import prepare
from codedinvnet.models.network import ModelOfGroups
from codedinvnet.nn.resnet import width_of_cost

if TYPE_CHECKING:
    from codedinvnet.training.fitting import TrainingData


class GroupNetwork(nn.Module, ABC):
    """A network with a place for each of k members.

    In a smaller group the members take turns in the places that are left, so that the network sees
    what it was trained on.

    Args:
        places: k.
    """

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    @abstractmethod
    def full(self, groups: Tensor) -> Tensor:
        """Map groups (B, k, C, H, W) of floats to logits (B, k, classes)."""

    def forward(self, groups: Tensor) -> Tensor:
        """Map groups (B, m, C, H, W) of floats, m at most k, to logits (B, m, classes)."""
        members = groups.shape[1]
        shown = groups[:, torch.arange(self.places, device=groups.device) % members]
        return self.full(shown)[:, :members]


class GroupCode(BackupCode):
    """Task k sends the scores of all members, which one network finds at once."""

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return the groups (B, m, C, H, W) as they are, scaled to 0..1."""
        return Encoded(prepare(queries, 0))


class GroupMethod(Method):
    """One network takes the group and answers for everybody; it is as wide as the cost allows.

    It is trained like the small backup, on as many images.
    """

    part = "backup"
    cost = 1.0

    @abstractmethod
    def network(self, given: Given, width: int) -> GroupNetwork:
        """Return the untrained network of a width."""

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return AnswersAll(k, PARITY_MODEL, encoded=True, cost=Costs(group=self.cost))

    def made_with(self, given: Given, settings: Any) -> Mapping[str, Any]:
        group = torch.rand(1, given.k, *given.shape)

        def cost(width: int) -> int:
            network = self.network(given, width).eval()
            return count_macs(lambda: network(group))

        return {"width": width_of_cost(cost, int(self.cost * served_macs(given.coded)))}

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        return self.network(given, int(made_with["width"]))

    def fit(self, teacher: Given, data: TrainingData, budget: PartSettings) -> nn.Module:
        from codedinvnet.training.parity import MembersStage

        part = self.start(teacher, data)
        scheme = self.build(replace(teacher, part=part))
        stage = MembersStage(part, scheme, data, budget, teacher.classifier)
        return data.train(stage, budget.epochs)

    def build(self, given: Given) -> Scheme:
        assert given.part is not None
        code = GroupCode(self.rules(given.k))
        model = ModelOfGroups(given.part, torch.zeros(1, given.k, *given.shape))
        return self.scheme(code, given, **{PARITY_MODEL: model})
