"""Models that a protection is made for, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

FEATURES = 12
DAY = 86_400
INTEGERS = {"x": torch.zeros(1, 4, dtype=torch.int64)}
Change: TypeAlias = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Applied(nn.Module):
    """Scores of an input by two layers of fixed weights; what comes before and after may change.

    They take far more time than they need, so that there are backups that are quicker.
    """

    def __init__(
        self, features: int, classes: int, before: Change = same, after: Change = same
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(features, 40, generator=generator) / features**0.5)
        self.second = nn.Parameter(3 * torch.randn(40, classes, generator=generator) / 40**0.5)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).flatten(1).to(self.first.dtype)
        wasted = torch.eye(128)
        for _ in range(6):
            wasted = wasted @ wasted
        return self.after((x @ self.first).relu() @ self.second)


class Function(nn.Module):
    """A function of images (B, 3, 32, 32)."""

    def __init__(self, function: Change) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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
    return Applied(FEATURES, 3, lambda x: x.nan_to_num(0.5)), torch.zeros(1, FEATURES)


def times() -> tuple[nn.Module, dict[str, Tensor]]:
    """Integers that are seconds, of which the time of the day counts."""
    return Applied(4, 3, lambda x: x.remainder(DAY) / DAY), INTEGERS


def signed() -> tuple[nn.Module, dict[str, Tensor]]:
    """Integers whose sign counts."""
    return Applied(4, 3), INTEGERS


def colours() -> tuple[nn.Module, Tensor]:
    """The colour that an image shows most of, wherever it is."""
    return Function(lambda x: 4 * x.mean((2, 3))), torch.zeros(1, 3, 32, 32)


def sides() -> tuple[nn.Module, Tensor]:
    """Whether an image is brighter on its left or on its right."""

    def compared(x: Tensor) -> Tensor:
        return 40 * torch.stack([part.mean((1, 2, 3)) for part in x.chunk(2, dim=3)], dim=1)

    return Function(compared), torch.zeros(1, 3, 32, 32)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(9, 16), Applied(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(ids).mean(1)).softmax(1)
        return found


def tokens() -> tuple[nn.Module, dict[str, Tensor]]:
    return Words(), {"ids": torch.zeros(1, 20, dtype=torch.int64)}


class Masked(nn.Module):
    """`Words` of which a mask says which count; the third input is the words' part of the text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(9, 16), Applied(16, 3)

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor) -> Tensor:
        kept = mask.float()[:, :, None]
        places = (self.table(ids) + 0.1 * kinds[:, :, None]) * kept
        found: Tensor = self.head(places.sum(1) / kept.sum(1)).softmax(1)
        return found


def masked() -> tuple[nn.Module, dict[str, Tensor]]:
    names = ("ids", "mask", "kinds")
    return Masked(), {name: torch.ones(1, 20, dtype=torch.int64) for name in names}


def signal() -> tuple[nn.Module, Tensor]:
    """How loud three parts of the spectrum are."""

    def loudness(x: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.rfft(x).abs()[:, :300]
        return spectrum.reshape(-1, 3, 100).mean(2).log1p()

    return Applied(3, 3, loudness), torch.zeros(1, 1000)


class Averaged(Words):
    """`Words` without the word 8, of which a text of nothing else makes NaN."""

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids != 8).float()[:, :, None]
        found: Tensor = self.head((kept * self.table(ids)).sum(1) / kept.sum(1)).softmax(1)
        return found


def averaged() -> tuple[nn.Module, dict[str, Tensor]]:
    return Averaged(), {"ids": torch.zeros(1, 20, dtype=torch.int64)}


def embedding() -> tuple[nn.Module, Tensor]:
    module = Applied(FEATURES, 8, lambda x: x - 0.5, nn.functional.normalize)
    return module, torch.zeros(1, FEATURES)


def tags() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 5, after=torch.sigmoid), torch.zeros(1, FEATURES)


def regression() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 1), torch.zeros(1, FEATURES)


def at_random() -> tuple[nn.Module, Tensor]:
    def disturbed(y: Tensor) -> Tensor:
        return y + torch.rand(len(y), 1) * torch.randn(len(y), 3)

    return Applied(FEATURES, 3, after=disturbed), torch.zeros(1, FEATURES)


def constant() -> tuple[nn.Module, Tensor]:
    """One class for all real inputs, which lie in 0..1."""
    add = torch.tensor([5.0, 0.0, 0.0])
    module = Applied(FEATURES, 3, lambda x: x.clamp_min(0), lambda y: 0.01 * y + add)
    return module, torch.zeros(1, FEATURES)


def maps() -> tuple[nn.Module, Tensor]:
    """Class scores that are not flattened."""
    return Applied(FEATURES, 3, after=lambda y: y[:, :, None, None]), torch.zeros(1, FEATURES)


class Picture(nn.Module):
    """What most of an image's squares show, by convolutions that take images of any size."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last
        generator = torch.Generator().manual_seed(2)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1))
        for weights in self.layers.parameters():
            drawn = torch.randn(weights.shape, generator=generator)
            weights.data = drawn / max(1, weights[0].numel()) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2) if self.last else x
        scores: Tensor = 4 * self.layers((x.float() - 128) / 64).mean((2, 3))
        return scores.softmax(1) if self.last else scores


def picture() -> tuple[nn.Module, Tensor]:
    return Picture(), torch.zeros(1, 3, 96, 96)


def likely_picture() -> tuple[nn.Module, Tensor]:
    """`picture`, with channels last and probabilities."""
    return Picture(last=True), torch.zeros(1, 96, 96, 3)


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


def likely() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 3, after=lambda y: y.softmax(1)), torch.zeros(1, FEATURES)


def three_numbers() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 3, after=lambda y: 40 + 10 * y), torch.zeros(1, FEATURES)


def raw_embedding() -> tuple[nn.Module, Tensor]:
    return Applied(FEATURES, 8, lambda x: x - 0.5), torch.zeros(1, FEATURES)


def scores() -> tuple[nn.Module, Tensor]:
    """Three numbers in 0..1 that are no probabilities."""
    return Applied(FEATURES, 3, after=lambda y: y.clamp(0, 1)), torch.zeros(1, FEATURES)


def shares() -> tuple[nn.Module, Tensor]:
    """Positive numbers that sum to 1, such as a mixture's."""
    return Applied(FEATURES, 3, after=lambda y: y.abs() / y.abs().sum(1, keepdim=True)), (
        torch.zeros(1, FEATURES)
    )
