"""Trains E and g' for several parities: with f and g frozen, and coefficients drawn at random.

Every group gets coefficients of its own, a random rotation of those of its size, and its members
go missing in random sets of up to r. Errors of parities reach a missing member as
decoded z = z + D e, with D of the coefficients alone (`codes/coefficients.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.coefficients import coefficients, evened, harmonics, rotations, solving
from codedinvnet.config import PartSettings
from codedinvnet.data import ImageSource
from codedinvnet.models.coded import CodedModel, empty_latent
from codedinvnet.training.part import PartStage
from codedinvnet.training.recovered import BATCH, embed_all

LATENT_WEIGHT = 0.05
"""Of the parities' errors, at the scale of one member."""
ALONE_WEIGHT = 0.3
"""Of answers from side features alone, and of those from latents alone."""
FULL_SHARE = 0.6
"""Share of the steps whose groups have k members; the others have 2 to k."""
ALL_MISSING_SHARE = 0.6
"""Share of the groups in which as many members are missing as there are parities."""


@dataclass(frozen=True)
class Embedded:
    """Images with what f and g make of them, computed once.

    Attributes:
        model: f and g.
        source: the images.
        rows: rows of the source, (N,).
        device: the device to compute on.
    """

    model: CodedModel
    source: ImageSource
    rows: Tensor
    device: torch.device

    @cached_property
    def latents(self) -> Tensor:
        """The latents of all images, (N, *latent_shape)."""
        parts = self.rows.split(10 * BATCH)
        return torch.cat(
            [embed_all(self.model, self.source.batch(rows)[0].to(self.device)) for rows in parts]
        )

    @cached_property
    @torch.no_grad()
    def chances(self) -> Tensor:
        """The probabilities of all direct answers, (N, classes)."""
        parts = self.latents.split(10 * BATCH)
        return torch.cat([self.model.classify(latents).softmax(1) for latents in parts])

    def images(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (G, m, C, H, W) and labels (G, m)."""
        images, labels = self.source.batch(self.rows[places.flatten()])
        images = images.to(self.device).unflatten(0, tuple(places.shape))
        return self.model.prepare(images), labels.view_as(places).to(self.device)


class ParitiesStage(PartStage):
    """Train E and g' so that any r missing members are decoded.

    Args:
        module: E and g'.
        model: f, g and the module.
        source: the images.
        train_rows: those to train on.
        validation_rows: those to validate on.
        k: the most members.
        r: parities.
        part: how to train.
    """

    name = "parities"
    gradient_norm = 5.0

    def __init__(
        self,
        module: nn.Module,
        model: CodedModel,
        source: ImageSource,
        train_rows: Tensor,
        validation_rows: Tensor,
        k: int,
        r: int,
        part: PartSettings,
    ) -> None:
        super().__init__(module, part)
        self.model, self.k, self.r = model, k, r
        self.train = Embedded(model, source, train_rows, self.device)
        self.validation = Embedded(model, source, validation_rows, self.device)

    def batch_loss(self, index: int) -> Tensor:
        draw = np.random.default_rng(int(torch.randint(2**62, (), generator=self.generator)))
        m = self.k if draw.random() < FULL_SHARE else int(draw.integers(2, self.k + 1))
        count = len(self.train.rows)
        groups = min(self.part.batch_size * self.k, count) // m
        places = torch.from_numpy(draw.choice(count, (groups, m), replace=False))
        turned = rotations(self.r, groups, draw) @ harmonics(m, self.r)
        columns = draw.permuted(np.tile(np.arange(m), (groups, 1)), axis=1)
        weights = evened(np.take_along_axis(turned, columns[:, None], 2))
        spread = np.zeros((groups, m, self.r))
        for group, row in enumerate(weights):
            # Every member goes missing once, with as many others as its set has.
            everything = draw.random() < ALL_MISSING_SHARE
            together = self.r if everything else int(draw.integers(1, self.r + 1))
            for start in range(0, m, together):
                missing = list(range(start, min(start + together, m)))
                few = draw.random() < 0.5
                used = draw.permutation(self.r)[: len(missing) if few else self.r].tolist()
                spread[group][np.ix_(missing, used)] = solving(row, used, missing)
        return self.loss_of(places, weights, spread)

    def loss_of(self, places: Tensor, weights: np.ndarray, spread: np.ndarray) -> Tensor:
        """Return the loss of groups.

        Args:
            places: the members' places, (G, m).
            weights: (G, r, m), of the parities.
            spread: (G, m, r), how the parities' errors reach each member.
        """
        x, labels = self.train.images(places)
        z = self.train.latents[places.to(self.device)]
        decoded, side, errors, growth = self.passed(x, z, weights, spread)
        classes = labels.flatten()
        soft = self.train.chances[places.to(self.device)].flatten(0, 1)

        def told(answers: Tensor) -> Tensor:
            return (F.cross_entropy(answers, classes) + F.cross_entropy(answers, soft)) / 2

        loss = told(self.model.recover(decoded, side, growth))
        alone = told(self.model.recover_from_side(side))
        alone = alone + told(self.model.recover_from_latent(decoded, side, growth))
        scales = 1 / np.abs(weights).max(2)
        scaled = errors * errors.new_tensor(scales)[..., None, None, None]
        return loss + ALONE_WEIGHT * alone + LATENT_WEIGHT * scaled.square().mean()

    def passed(
        self, x: Tensor, z: Tensor, weights: np.ndarray, spread: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return decoded latents and side features (G·m, ...), errors (G, r, ...), and growth.

        Args:
            x: prepared images, (G, m, C, H, W).
            z: their latents, (G, m, *latent_shape).
            weights: see `loss_of`.
            spread: likewise.
        """
        rows = x.new_tensor(weights)
        encodings = [self.model.encoder.encode(x, rows[:, j]) for j in range(self.r)]
        parities = self.model.network(torch.cat([e.parity for e in encodings]))
        parity = torch.stack(parities.chunk(self.r), 1)
        empty = empty_latent(self.model)
        mixed = torch.einsum("grm,gm...->gr...", rows, z)
        errors = parity - mixed - (1 - rows.sum(2))[..., None, None, None] * empty
        reached = torch.einsum("gmr,gr...->gm...", x.new_tensor(spread), errors)
        growth = x.new_tensor(np.linalg.norm(spread, axis=2)).flatten()
        return (z + reached).flatten(0, 1), encodings[0].side.flatten(0, 1), errors, growth

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by recovered accuracy with r neighbours missing, in a fixed grouping."""
        known, k = self.validation, self.k
        order = torch.randperm(len(known.rows), generator=torch.Generator().manual_seed(k))
        places = order[: len(order) // k * k].view(-1, k)
        weights = coefficients(k, self.r)
        spread = np.zeros((k, self.r))
        for start in range(0, k, self.r):
            missing = list(range(start, min(start + self.r, k)))
            spread[missing] = solving(weights, list(range(self.r)), missing)
        hits, guessed, error = 0, 0, 0.0
        for some in places.split(BATCH // k):
            x, labels = known.images(some)
            z, many = known.latents[some.to(self.device)], (len(some), 1, 1)
            with torch.no_grad():
                decoded, side, errors, growth = self.passed(
                    x, z, np.tile(weights, many), np.tile(spread, many)
                )
                answers = self.model.recover(decoded, side, growth)
                guesses = self.model.recover_from_side(side)
            hits += int((answers.argmax(1) == labels.flatten()).sum())
            guessed += int((guesses.argmax(1) == labels.flatten()).sum())
            error += float(errors.square().mean()) * len(some)
        scalars = {
            "validation_recovered": hits / places.numel(),
            "validation_guessed": guessed / places.numel(),
            "validation_error": (error / len(places)) ** 0.5,
        }
        return scalars["validation_recovered"], scalars
