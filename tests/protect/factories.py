"""Models that a protection is made for, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 12


class Applied(nn.Module):
    """Some scores of an input, behind a layer of fixed weights."""

    def __init__(self, features: int, classes: int, scale: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(features, 40, generator=generator) / features**0.5)
        self.second = nn.Parameter(scale * torch.randn(40, classes, generator=generator) / 40**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).float() @ self.first).relu() @ self.second


class Random(Applied):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(len(x), 1) * torch.randn(len(x), 3)


class Constant(Applied):
    """Its scores depend on the input only where it is no real one: beyond 0..1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp_min(0)) * 0.01 + torch.tensor([5.0, 0.0, 0.0])


def vectors() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 3), torch.zeros(1, FEATURES)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Applied(8, 3)

    def forward(self, numbers: Tensor, flags: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([numbers, flags.float()], dim=1))
        return found


def two_inputs() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return TwoInputs(), (torch.zeros(1, 5), torch.zeros(1, 3, dtype=torch.bool))


def smaller() -> tuple[nn.Module, Tensor]:
    """`vectors` with 16 of its 40 hidden units."""
    module = Applied(FEATURES, 3)
    module.first = nn.Parameter(module.first[:, :16].detach())
    module.second = nn.Parameter(module.second[:16].detach())
    return module, torch.zeros(1, FEATURES)


def slower() -> tuple[nn.Module, Tensor]:
    return vectors()


def other_inputs() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES + 1, 3), torch.zeros(1, FEATURES + 1)


def images() -> tuple[nn.Module, Tensor]:
    return Applied(3 * 16 * 16, 3), torch.zeros(1, 3, 16, 16)


def colours() -> tuple[nn.Module, Tensor]:
    """What an image shows most of, wherever it stands."""

    class Most(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    return Most(), torch.zeros(1, 3, 16, 16)


def tokens() -> tuple[nn.Module, dict[str, Tensor]]:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 16), Applied(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.head(self.table(ids).mean(1)).softmax(1)
            return found

    return Words(), {"ids": torch.zeros(1, 20, dtype=torch.int64)}


def at_random() -> tuple[nn.Module, Tensor]:
    return Random(FEATURES, 3), torch.zeros(1, FEATURES)


def constant() -> tuple[nn.Module, Tensor]:
    return Constant(FEATURES, 3), torch.zeros(1, FEATURES)
