"""ParM: a parity *model* whose output stands for the whole group, and its learned-code sibling.

Kosaian, Rashmi & Venkataraman, *Parity Models: Erasure-Coded Resilience for Prediction Serving
Systems*, SOSP 2019; *Learning-Based Coded Computation*, IEEE JSAIT 2020.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.base import Encoded, Scheme, ScoresCode, check_k
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.codes.method import BARS, ONE, Given, Lessons, Method, Published, Tolerance
from codedinvnet.codes.rules import PARITY_MODEL, SERVED, CodeRules, Parities
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import prepare

if TYPE_CHECKING:
    from codedinvnet.data import ImageSource
    from codedinvnet.training.loop import Stage


class SumCode(ScoresCode):
    """The parity model sees the average image; its output is the sum of the members' logits.

    Addition as the encoder and subtraction as the decoder (SOSP'19, section 3.2). The sum of the
    images is divided by k, which the first layer of a parity model could do as well. Groups have
    exactly k members, since the parity model was trained on averages of k.
    """

    @staticmethod
    def mix(images: Tensor) -> Tensor:
        """Return the parity images (B, C, H, W) of groups (B, k, C, H, W) of floats."""
        return images.mean(dim=1)

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return the parity images of groups (B, k, C, H, W)."""
        return Encoded(self.mix(prepare(queries, 0)))

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        others = [outputs[i] for i in range(size) if i != member]
        return outputs[self.rules.k] - torch.stack(others).sum(dim=0)


class ConcatCode(SumCode):
    """ParM with its image-specific encoder: small copies of the images in a grid (section 4.2.3).

    Each image is averaged down to its cell.
    """

    @staticmethod
    def mix(images: Tensor) -> Tensor:
        """Return the parity images (B, C, H, W) of groups (B, k, C, H, W) of floats.

        Raises:
            UserError: if the grid does not divide the image.
        """
        batch, k, channels, height, width = images.shape
        check_tiles(k, (channels, height, width))
        rows, columns = grid_shape(k)
        small = F.avg_pool2d(images.flatten(0, 1), (rows, columns))
        grid = small.view(batch, rows, columns, channels, height // rows, width // columns)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


class ParityModel(nn.Module):
    """A classifier whose output is taken k-fold.

    A copy of the served classifier in this place begins near the sum it shall learn: on the
    average image it returns something like the average logits.

    Args:
        classifier: maps images (B, C, H, W) to logits (B, classes).
        k: members of a group.
    """

    def __init__(self, classifier: nn.Module, k: int) -> None:
        super().__init__()
        self.classifier, self.k = classifier, k

    def forward(self, images: Tensor) -> Tensor:
        """Map parity images (B, C, H, W) to sums of logits (B, classes)."""
        total: Tensor = self.k * self.classifier(images)
        return total


def grid_shape(k: int) -> tuple[int, int]:
    """Return (rows, columns) of the squarest grid of k cells; 4 -> (2, 2), 2 -> (1, 2)."""
    rows = next(n for n in range(int(k**0.5), 0, -1) if k % n == 0)
    return rows, k // rows


def check_tiles(k: int, image_shape: tuple[int, int, int]) -> None:
    """Refuse groups whose images do not tile one image.

    Raises:
        UserError: if k is below 2, or the grid of k images does not divide the image.
    """
    check_k(k)
    rows, columns = grid_shape(k)
    _, height, width = image_shape
    if height % rows or width % columns:
        raise UserError(
            f"parm-concat cannot tile k = {k} images: a grid of {rows}x{columns} does not divide "
            f"{height}x{width} pixels; use k = 4"
        )


class ConvEncoder(nn.Module):
    """The learned encoder: convolutions with growing dilation over the stacked images.

    JSAIT 2020, section IV-B. The k images are the input channels, and colour channels are encoded
    each on its own by the same weights, so that one encoder serves grey and colour images.

    Args:
        k: images in a group.
        width: channels of the inner layers for each of the k images (the paper's code: 20).
    """

    def __init__(self, k: int, width: int = 20) -> None:
        super().__init__()
        hidden = k * width
        layers: list[nn.Module] = []
        before = k
        for dilation in (1, 1, 2, 4, 8, 1):
            layers.append(nn.Conv2d(before, hidden, 3, padding=dilation, dilation=dilation))
            layers.append(nn.ReLU())
            before = hidden
        last = nn.Conv2d(hidden, 1, 1)
        # It begins as the average image, a parity that the classifier has some idea of.
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        """Map groups (B, k, C, H, W) of floats to parity images (B, C, H, W)."""
        by_colour = images.transpose(1, 2)
        encoded: Tensor = self.layers(by_colour.flatten(0, 1))
        return images.mean(dim=1) + encoded.view(by_colour.shape[:2] + images.shape[3:])


class LinearDecoder(nn.Module):
    """The learned decoder: fully connected layers over all outputs, the missing ones zero.

    JSAIT 2020, section IV-C. A plain subtraction runs beside the layers, so that it begins there.

    Args:
        k: members of a group.
        classes: length of an output.
        width: hidden units for each class of each output.
    """

    def __init__(self, k: int, classes: int, width: int = 8) -> None:
        super().__init__()
        self.k, self.classes = k, classes
        hidden = width * (k + 1) * classes
        last = nn.Linear(hidden, k * classes)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(
            nn.Linear((k + 1) * classes, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            last,
        )

    def forward(self, outputs: Tensor) -> Tensor:
        """Map outputs (B, k + 1, classes), parity last, to the members' logits (B, k, classes).

        One member's output is zero, and only its logits are of use.
        """
        subtracted = self.k * outputs[:, -1] - outputs[:, :-1].sum(dim=1)
        learned: Tensor = self.layers(outputs.flatten(1))
        return subtracted[:, None] + learned.view(-1, self.k, self.classes)


class LearnedCode(ScoresCode):
    """A learned encoder and decoder around the unchanged classifier (JSAIT 2020, section III).

    All workers run the same classifier, the parity worker on the encoder's image.

    Args:
        rules: the rules of a code of one parity.
        encoder: maps groups (B, k, C, H, W) to images.
        decoder: maps outputs (B, k + 1, classes) to logits (B, k, classes).
    """

    def __init__(self, rules: CodeRules, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__(rules)
        self.encoder, self.decoder = encoder, decoder

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return the encoder's image of groups (B, k, C, H, W)."""
        return Encoded(self.encoder(prepare(queries, 0)))

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        parity = outputs[self.rules.k]
        zero = torch.zeros_like(parity)
        stacked = [zero if i == member else outputs[i] for i in range(size)] + [parity]
        answers: Tensor = self.decoder(torch.stack(stacked, dim=1))
        return answers[:, member]


class ParM(Method):
    """A parity model, distilled from the classifier, on the average image."""

    name = "parm"
    published: ClassVar[tuple[Published, ...]] = (
        Published("mnist", 10, 99.0, 59.2, BARS),
        Published("fashion", 10, 97.0, 59.0, BARS),
        Published("cifar10", 10, 94.0, 20.4, BARS),
        Published("", 10, None, 53.4, "Dinh & Lee, ICML 2021, abstract: 32.5 less", beside="mnist"),
    )
    part = "parity"
    runs = PARITY_MODEL
    code: type[SumCode] = SumCode

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return Parities(k, fixed_size=True, model=self.runs)

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        return ParityModel(copy.deepcopy(given.classifier).requires_grad_(True), given.k)

    def stage(self, part: nn.Module, given: Given, lessons: Lessons) -> Stage:
        from codedinvnet.training.parity import ParityStage

        options, taught = lessons.served.training, lessons.taught()
        return ParityStage(
            part,
            self.code.mix,
            *taught,
            given.k,
            lessons.settings,
            flip=options.flip,
            shift=options.shift,
        )

    def build(self, given: Given) -> Scheme:
        assert given.part is not None
        return self.scheme(self.code(self.rules(given.k)), given, **{PARITY_MODEL: given.part})


class ConcatParM(ParM):
    """A parity model on small copies of the images in a grid."""

    name = "parm-concat"
    in_brief = False
    published = ()
    code = ConcatCode

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        check_tiles(k, cast(tuple[int, int, int], shape))


class LearnedParM(ParM):
    """A learned encoder and decoder, trained together around the classifier."""

    name = "parm-learned"
    in_brief = False
    published = ()
    runs = SERVED

    def encoding_macs(self, given: Given, settings: Any) -> int:
        encoder, group = ConvEncoder(given.k), torch.zeros(1, given.k, *given.shape)
        return count_macs(lambda: encoder(group))

    def check_training(
        self, settings: Any, bundle: BundleInfo, k: int, train: ImageSource | None
    ) -> None:
        super().check_training(settings, bundle, k, train)
        if settings.augment:
            raise UserError(f"{self.name} learns from images as they are: set no parity.augment")

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        decoder = LinearDecoder(given.k, given.classes)
        return nn.ModuleDict({"encoder": ConvEncoder(given.k), "decoder": decoder})

    def stage(self, part: nn.Module, given: Given, lessons: Lessons) -> Stage:
        from codedinvnet.training.parity import LearnedCodeStage

        train, validation = lessons.taught()
        coder = cast(nn.ModuleDict, part)
        return LearnedCodeStage(
            coder, given.classifier, train, validation, given.k, lessons.settings
        )

    def build(self, given: Given) -> Scheme:
        assert isinstance(given.part, nn.ModuleDict)
        code = LearnedCode(self.rules(given.k), given.part["encoder"], given.part["decoder"])
        return self.scheme(code, given)
