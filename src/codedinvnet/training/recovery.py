"""The recovery objective: E and g' learn from the decoded predictions of all positions.

Each step draws new groups, of a size m drawn from 2 to k; a mosaic has weights for each of its
grids, and each grid gets as many steps as any other. First f and g are frozen and
their latents are cached if they fit; then all four are trained together, with the direct answers'
own cross-entropy in addition to the decoded ones', so that normal accuracy is kept.

Smaller groups come in larger numbers, so that every step sees about as many images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.erase import recovered_accuracy
from codedinvnet.common.config import RecoveryFusionSettings, TrainSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.data import ImageSource, spread_rows
from codedinvnet.models.coded import CodedModel, shared_error
from codedinvnet.nn.fusion import mosaic_grid
from codedinvnet.nn.lipschitz import project
from codedinvnet.training.loop import Stage, make_optimizer
from codedinvnet.training.network import augment, embed_all
from codedinvnet.training.precision import autocast

KEPT_BYTES = 4 << 30
"""Latents of all training images are kept if they take at most so much."""
SETTLED = 0.8
"""From this share of joint training on, batch statistics are those that will be served."""


class Passed(NamedTuple):
    """Groups of m that went through E and f.

    Attributes:
        direct: latents (n, C, H, W) of the first n images, which are answered directly.
        decoded: every member's decoded latent, (G, m, C, H, W); empty ones from a mosaic.
        side: every member's features that the parity worker sends, (G, m, n).
        error: m·z_p − Σ z_j, (G, C, H, W); None from a mosaic.
    """

    direct: Tensor
    decoded: Tensor
    side: Tensor
    error: Tensor | None


def draw_size(largest: int, apart: bool, generator: torch.Generator) -> int:
    """Draw a group size from 2 to `largest`; if E keeps members apart, first the mosaic's grid."""
    sizes = list(range(2, largest + 1))
    if apart:
        grids = list(dict.fromkeys(mosaic_grid(m) for m in sizes))
        grid = grids[int(torch.randint(len(grids), (), generator=generator))]
        sizes = [m for m in sizes if mosaic_grid(m) == grid]
    return sizes[int(torch.randint(len(sizes), (), generator=generator))]


def phases(
    fusion: RecoveryFusionSettings,
    options: TrainSettings,
    train: ImageSource,
    validation: ImageSource,
    model: CodedModel,
    schemes: Mapping[int, Scheme],
) -> Iterator[tuple[RecoveryStage, int]]:
    """Yield the stages of the objective that have epochs, with their number.

    One is made when the one before it has ended, since it starts from that one's weights.
    """
    for joint, epochs in ((False, fusion.epochs), (True, fusion.joint_epochs)):
        if epochs:
            yield (
                RecoveryStage(fusion, options, train, validation, model, schemes, joint=joint),
                epochs,
            )


class RecoveryStage(Stage):
    """Train E and g' with f and g frozen, or (`joint`) all four.

    Args:
        fusion: how to train.
        options: how f and g are trained: augmentation, precision, weight decay.
        train: the images.
        validation: those by which the epoch is chosen.
        model: f, g, E and g'.
        schemes: the model's own code by group size; the epoch is chosen by the largest one's
            recovered accuracy.
        joint: whether f and g train as well.
    """

    gradient_norm: float | None = 5.0
    """The first parity queries are far off, and their losses large."""

    def __init__(
        self,
        fusion: RecoveryFusionSettings,
        options: TrainSettings,
        train: ImageSource,
        validation: ImageSource,
        model: CodedModel,
        schemes: Mapping[int, Scheme],
        *,
        joint: bool,
    ) -> None:
        self.name = "joint" if joint else "recovery"
        self.fusion, self.options, self.model = fusion, options, model
        self.train, self.validation = train, validation
        self.device, self.schemes, self.joint = first_tensor(model).device, schemes, joint
        self.apart = model.encoder.keeps_apart
        self.batch_size = fusion.joint_batch_size if joint else fusion.batch_size
        model.requires_grad_(joint)
        model.encoder.requires_grad_(True)
        if model.recovery_head is not None:
            model.recovery_head.requires_grad_(True)
        rate = fusion.joint_learning_rate if joint else fusion.learning_rate
        super().__init__(
            {"model": model},
            {"optimizer": make_optimizer([model], rate, options.weight_decay)},
            rate=rate,
            epochs=fusion.joint_epochs if joint else fusion.epochs,
            steps_per_epoch=fusion.steps_per_epoch,
        )
        self.latents: Tensor | None = None

    def initialise(self) -> None:
        """Normalise the recovery head's input, by latents as they are served."""
        if self.model.recovery_head is not None:
            rows = spread_rows(torch.arange(len(self.train)), 1024)
            network = self.model.network
            training = network.training
            network.eval()  # batch statistics stay as they were trained
            z = embed_all(self.model, self.train.batch(rows)[0].to(self.device))
            network.train(training)
            self.model.recovery_head.norm.initialise(z)

    def latents_fit(self) -> bool:
        """Tell whether f of all training images may be kept in memory, 4 bytes a number."""
        return 4 * len(self.train) * math.prod(self.model.latent_shape) <= KEPT_BYTES

    def cached_latents(self) -> Tensor:
        """Return f of all training images in their order, computed once."""
        if self.latents is None:
            parts = [
                embed_all(self.model, self.train.batch(rows)[0].to(self.device))
                for rows in torch.arange(len(self.train)).split(2500)
            ]
            self.latents = torch.cat(parts)
        return self.latents

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Choose what batch statistics are of; the first epoch of the first phase initialises."""
        super().start_epoch(epoch, generator)
        if not self.joint:
            self.model.network.eval()  # i-RevNet's batch statistics stay as they were trained
        elif epoch >= SETTLED * self.fusion.joint_epochs:
            self.model.eval()
        if epoch == 0 and not (self.joint and self.fusion.epochs):
            self.initialise()

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        found = super().step(epoch, index)
        if self.joint:
            project(self.model.network)
        return found

    def batch_loss(self, index: int) -> Tensor:
        """Draw groups of one random size and return their loss."""
        members = draw_size(self.fusion.members, self.apart, self.generator)
        groups = self.batch_size * self.fusion.members // members
        wanted = groups * members
        if wanted <= len(self.train):
            order = torch.randperm(len(self.train), generator=self.generator)[:wanted]
        else:
            order = torch.randint(len(self.train), (wanted,), generator=self.generator)
        images, labels = self.train.batch(order)
        labels = labels.to(self.device)
        x = self.model.prepare(images.to(self.device)).unflatten(0, (groups, members))
        passed = self._apart_pass(x) if self.apart else self._mean_pass(x, order)
        side, decoded = passed.side.flatten(0, 1), passed.decoded.flatten(0, 1)
        answers = self.model.recover(decoded, side, members)
        recovered = F.cross_entropy(answers, labels)
        if self.fusion.distilled_share:
            recovered = torch.lerp(
                recovered, self._distilled(answers, passed.direct), self.fusion.distilled_share
            )
        loss, terms = recovered, {"recovered": recovered}
        if passed.error is not None:
            terms["latent"] = passed.error.square().mean()
            loss = loss + self.fusion.latent_weight * terms["latent"]
        if self.fusion.evidence_weight and self.model.encoder.side_features:
            from_latent = self.model.recover_from_latent(decoded, side, members)
            alone = F.cross_entropy(from_latent, labels)
            alone = alone + F.cross_entropy(self.model.recover_from_side(side), labels)
            loss = loss + self.fusion.evidence_weight * alone
        if self.joint:
            direct = self.model.classify(passed.direct)
            terms["normal"] = F.cross_entropy(direct, labels[: len(direct)])
            loss = loss + self.fusion.normal_weight * terms["normal"]
        self.terms = terms
        return loss

    def _distilled(self, answers: Tensor, latents: Tensor) -> Tensor:
        """Return the cross-entropy of decoded answers to the direct ones of the first images."""
        with torch.no_grad():
            direct = self.model.classify(latents).softmax(dim=1)
        return F.cross_entropy(answers[: len(direct)], direct)

    def _varied(self, x: Tensor) -> Tensor:
        """Augment images (G, m, C, H, W)."""
        options = self.options
        varied = augment(x.flatten(0, 1), options.flip, options.shift, self.generator)
        return varied.view_as(x)

    def _mean_pass(self, x: Tensor, order: Tensor) -> Passed:
        """Pass groups x (G, m, C, H, W), rows `order` of the training images, through E and f."""
        if self.joint:
            x = self._varied(x)
        encoding = self.model.encoder(x)
        if self.joint:
            flat, parity = self._together(x.flatten(0, 1), encoding.parity)
        else:
            if self.latents_fit():
                flat = self.cached_latents()[order.to(self.device)]
            else:
                with torch.no_grad():
                    flat = self.model.network(x.flatten(0, 1))
            parity = self.model.network(encoding.parity)
        z = flat.unflatten(0, x.shape[:2])
        error = shared_error(parity, z)
        return Passed(flat, z + error[:, None], encoding.side, error)

    def _apart_pass(self, x: Tensor) -> Passed:
        """Pass groups through an E that keeps the members apart, and some of them through f.

        Nothing is subtracted from such a parity's latent, so the members' own are needed for the
        direct answers' sake alone.
        """
        x = self._varied(x)
        with autocast(self.options.precision, self.device):
            encoding = self.model.encoder(x)
        share = self.fusion.normal_share * x.shape[0] * x.shape[1]
        wanted = self.joint or self.fusion.distilled_share
        answered = max(1, round(share)) if wanted else 0
        direct, parity = self._together(x.flatten(0, 1)[:answered], encoding.parity)
        sent = self.model.parity(parity, encoding.side.float())
        return Passed(direct, parity.new_zeros(*x.shape[:2], 0), sent.side, None)

    def _together(self, queries: Tensor, parities: Tensor) -> tuple[Tensor, Tensor]:
        """Embed queries and parities in one pass, so that batch statistics are of both."""
        with autocast(self.options.precision, self.device):
            both = self.model.network(torch.cat([queries, parities])).float()
        return both[: len(queries)], both[len(queries) :]

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by normal accuracy plus recovered accuracy at the largest group size."""
        images, labels = self.validation.batch(torch.arange(len(self.validation)))
        latents = embed_all(self.model, images.to(self.device))
        with torch.no_grad():
            predictions = self.model.classify(latents).argmax(1)
        normal = float((predictions.cpu() == labels).float().mean())
        scalars, own = {"validation_normal": normal}, latents.flatten(1).cpu()
        for k, scheme in self.schemes.items():
            scalars[f"validation_recovered_k{k}"] = recovered_accuracy(scheme, self.validation, own)
        return normal + scalars[f"validation_recovered_k{self.fusion.members}"], scalars
