"""The recovery objective: E learns from the decoded predictions of all positions.

Each step draws new groups, of a size m drawn from 2 to k. First f and g are frozen and their
latents are cached if they fit; then all three are trained together, with the direct answers' own
cross-entropy in addition to the decoded ones', so that normal accuracy is kept.

Smaller groups come in larger numbers, so that every step sees about as many images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.erase import recovered_accuracy
from codedinvnet.common.config import RecoveryFusionSettings, TrainSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.data import ImageSource
from codedinvnet.models.coded import CodedModel, shared_error
from codedinvnet.nn.lipschitz import project
from codedinvnet.training.loop import Stage, make_optimizer
from codedinvnet.training.network import augment, embed_all
from codedinvnet.training.precision import autocast

KEPT_BYTES = 4 << 30
"""Latents of all training images are kept if they take at most so much."""
SETTLED = 0.8
"""From this share of joint training on, batch statistics are those that will be served."""


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
    """Train E with f and g frozen, or (`joint`) all three.

    Args:
        fusion: how to train.
        options: how f and g are trained: augmentation, precision, weight decay.
        train: the images.
        validation: those by which the epoch is chosen.
        model: f, g and E.
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
        self.batch_size = fusion.joint_batch_size if joint else fusion.batch_size
        model.requires_grad_(joint)
        model.encoder.requires_grad_(True)
        rate = fusion.joint_learning_rate if joint else fusion.learning_rate
        super().__init__(
            {"model": model},
            {"optimizer": make_optimizer([model], rate, options.weight_decay)},
            rate=rate,
            epochs=fusion.joint_epochs if joint else fusion.epochs,
            steps_per_epoch=fusion.steps_per_epoch,
        )
        self.latents: Tensor | None = None

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
        """Choose what batch statistics are of."""
        super().start_epoch(epoch, generator)
        if not self.joint:
            self.model.network.eval()  # i-RevNet's batch statistics stay as they were trained
        elif epoch >= SETTLED * self.fusion.joint_epochs:
            self.model.eval()

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        found = super().step(epoch, index)
        if self.joint:
            project(self.model.network)
        return found

    def batch_loss(self, index: int) -> Tensor:
        """Draw groups of one random size and return their loss."""
        members = int(torch.randint(2, self.fusion.members + 1, (), generator=self.generator))
        groups = self.batch_size * self.fusion.members // members
        wanted = groups * members
        if wanted <= len(self.train):
            order = torch.randperm(len(self.train), generator=self.generator)[:wanted]
        else:
            order = torch.randint(len(self.train), (wanted,), generator=self.generator)
        images, labels = self.train.batch(order)
        labels = labels.to(self.device)
        x = self.model.prepare(images.to(self.device))
        latents, parity = self._pass(x.unflatten(0, (groups, members)), order)
        z = latents.unflatten(0, (groups, members))
        error = shared_error(parity, z)
        decoded = self.model.classify((z + error[:, None]).flatten(0, 1))
        terms = {"recovered": F.cross_entropy(decoded, labels), "latent": error.square().mean()}
        loss = terms["recovered"] + self.fusion.latent_weight * terms["latent"]
        if self.joint:
            terms["normal"] = F.cross_entropy(self.model.classify(latents), labels)
            loss = loss + self.fusion.normal_weight * terms["normal"]
        self.terms = terms
        return loss

    def _pass(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of the members of groups x (G, m, C, H, W) and those of the parities.

        The members are rows `order` of the training images.
        """
        if self.joint:
            options, flat = self.options, x.flatten(0, 1)
            flat = augment(flat, options.flip, options.shift, self.generator)
            return self._together(flat, self.model.encoder(flat.view_as(x)))
        if self.latents_fit():
            latents = self.cached_latents()[order.to(self.device)]
        else:
            with torch.no_grad():
                latents = self.model.network(x.flatten(0, 1))
        return latents, self.model.network(self.model.encoder(x))

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
