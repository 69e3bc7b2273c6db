"""What the stages that train one part of a rival method have in common."""

from __future__ import annotations

from collections.abc import Sized

import torch
from torch import Tensor, nn

from codedinvnet.common.config import PartSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.models.checkpoint import PART
from codedinvnet.training.loop import Stage


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
