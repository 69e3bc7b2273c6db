"""What the stages that train one part of a rival method have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized

import torch
from torch import Tensor, nn

from codedinvnet.common.config import PartSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.models.checkpoint import PART
from codedinvnet.training.loop import set_rate, warmup_cosine

WARMUP = 0.1


def batch_places(order: Sized, index: int, size: int) -> Tensor:
    """Return the places of an epoch's batch in its order, which is repeated as often as needed."""
    return (index * size + torch.arange(size)) % len(order)


class PartStage(ABC):
    """Train one module with AdamW, its rate up linearly and down a half cosine.

    Args:
        module: the module that is trained, in place.
        part: how to train.
    """

    name: str
    gradient_norm: float | None = None
    """Longer gradients are scaled down to this norm; None leaves them."""

    def __init__(self, module: nn.Module, part: PartSettings) -> None:
        self.module, self.part = module, part
        self.device = first_tensor(module).device
        self.steps_per_epoch = part.steps_per_epoch
        self.total_steps = part.epochs * part.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=part.learning_rate, weight_decay=part.weight_decay
        )
        self.generator = torch.Generator()

    @abstractmethod
    def batch_loss(self, index: int) -> Tensor:
        """Draw the epoch's batch of this index and return its loss."""

    @abstractmethod
    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Return a score, higher is better, and scalars to show, from the validation images."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what is trained."""
        return {PART: self.module}

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Return the one optimiser."""
        return {"optimizer": self.optimizer}

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Keep the epoch's generator."""
        self.generator = generator

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        """Do one step on one batch."""
        factor = warmup_cosine(epoch * self.steps_per_epoch + index, self.total_steps, WARMUP)
        set_rate(self.optimizer, self.part.learning_rate * factor)
        loss = self.batch_loss(index)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.gradient_norm)
        self.optimizer.step()
        return {"loss": float(loss.detach())}
