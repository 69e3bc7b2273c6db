"""Models that a protection is made for, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 12
DAY = 86_400


class Applied(nn.Module):
    """Some scores of an input, behind a layer of fixed weights."""

    def __init__(self, features: int, classes: int, scale: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(features, 40, generator=generator) / features**0.5)
        self.second = nn.Parameter(scale * torch.randn(40, classes, generator=generator) / 40**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).to(self.first.dtype) @ self.first).relu() @ self.second


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


def gaps() -> tuple[nn.Module, Tensor]:
    """`vectors` that may have missing values."""

    class Gaps(Applied):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.nan_to_num(0.5))

    return Gaps(FEATURES, 3), torch.zeros(1, FEATURES)


def times() -> tuple[nn.Module, dict[str, Tensor]]:
    """Integers that are seconds, of which the time of the day counts."""

    class Times(Applied):
        def forward(self, seconds: Tensor) -> Tensor:
            return super().forward(seconds.remainder(DAY) / DAY)

    return Times(4, 3), {"seconds": torch.zeros(1, 4, dtype=torch.int64)}


def signed() -> tuple[nn.Module, dict[str, Tensor]]:
    """Integers whose sign counts."""
    return Applied(4, 3), {"x": torch.zeros(1, 4, dtype=torch.int64)}


def colours() -> tuple[nn.Module, Tensor]:
    """The colour that an image shows most of, wherever it is."""

    class Most(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 4 * x.mean((2, 3))

    return Most(), torch.zeros(1, 3, 32, 32)


def sides() -> tuple[nn.Module, Tensor]:
    """Whether an image is brighter on its left or on its right."""

    class Sides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = (part.mean((1, 2, 3)) for part in x.chunk(2, dim=3))
            return 40 * torch.stack([left, right], dim=1)

    return Sides(), torch.zeros(1, 3, 32, 32)


def tokens() -> tuple[nn.Module, dict[str, Tensor]]:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 16), Applied(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.head(self.table(ids).mean(1)).softmax(1)
            return found

    return Words(), {"ids": torch.zeros(1, 20, dtype=torch.int64)}


def embedding() -> tuple[nn.Module, Tensor]:
    class Unit(Applied):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(super().forward(x - 0.5))

    return Unit(FEATURES, 8), torch.zeros(1, FEATURES)


def tags() -> tuple[nn.Module, Tensor]:
    class Tags(Applied):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    return Tags(FEATURES, 5), torch.zeros(1, FEATURES)


def regression() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 1), torch.zeros(1, FEATURES)


def at_random() -> tuple[nn.Module, Tensor]:
    return Random(FEATURES, 3), torch.zeros(1, FEATURES)


def constant() -> tuple[nn.Module, Tensor]:
    return Constant(FEATURES, 3), torch.zeros(1, FEATURES)


class Picture(nn.Module):
    """What most of an image's squares show, by convolutions that take images of any size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1))
        for weights in self.layers.parameters():
            drawn = torch.randn(weights.shape, generator=generator)
            weights.data = drawn / max(1, weights[0].numel()) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layers((x.float() - 128) / 64)
        return 4 * maps.mean((2, 3))


def picture() -> tuple[nn.Module, Tensor]:
    return Picture(), torch.zeros(1, 3, 96, 96)


def likely_picture() -> tuple[nn.Module, Tensor]:
    """`picture`, with channels last and probabilities."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picture = Picture()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.picture(x.permute(0, 3, 1, 2)).softmax(1)
            return found

    return Last(), torch.zeros(1, 96, 96, 3)


class Residual(nn.Module):
    """A small residual network of images, with normalisations, whose scores depend on colours."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)
        )
        self.head = nn.Linear(8, 3)
        for weights in self.parameters():
            if weights.ndim > 1:
                drawn = torch.randn(weights.shape, generator=generator)
                weights.data = drawn / weights[0].numel() ** 0.5
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        h = self.stem(4 * images - 2).relu()
        for block in self.blocks:
            h = (h + 0.3 * block(h)).relu()
        scores: Tensor = 9 * self.head(h.mean((2, 3)))
        return scores


def residual() -> tuple[nn.Module, dict[str, Tensor]]:
    return Residual(), {"images": torch.zeros(1, 3, 16, 16)}


class Transformer(nn.Module):
    """A small vision transformer, whose scores depend on colours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(8 * images - 4).flatten(2).transpose(1, 2)
        scores: Tensor = 5 * self.head(self.layers(tokens).mean(1))
        return scores


def transformer() -> tuple[nn.Module, dict[str, Tensor]]:
    return Transformer(), {"images": torch.zeros(1, 3, 16, 16)}
