"""Coded-InvNet with several parities: each stands for a mixture of its own of the latents.

The fusion encoder takes weights, so that one E makes all parities of a group. As many missing
members as there are parities are decoded together, and one wrong worker is located.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.coefficients import coefficients, solving
from codedinvnet.codes.invnet import CodedInvNet
from codedinvnet.codes.mean import LatentCode, has_side
from codedinvnet.codes.method import ONE, Given, Lessons, Tolerance
from codedinvnet.codes.rules import SERVED, Parities
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import CodedModel, empty_latent, with_encoder
from codedinvnet.models.network import embedding_of
from codedinvnet.nn.head import DoubtingHead, RecoveryHead

if TYPE_CHECKING:
    from codedinvnet.training.loop import Stage


class WeightedCode(LatentCode):
    """r parities per group, each of its own coefficients.

    Missing members are decoded from all parities that are here, by least squares. If more are
    missing, their side features alone answer, unless the encoder has none.

    Args:
        model: f, g, E and g', in evaluation mode.
        k: the most members.
        r: parities.
    """

    def __init__(self, model: CodedModel, k: int, r: int) -> None:
        super().__init__(model, Parities(k, r, guesses=has_side(model)))

    def weights(self, size: int) -> np.ndarray:
        """Return the coefficients of a group, (r, size)."""
        return coefficients(size, self.rules.r)

    def mixture(self, task: int, x: Tensor) -> Tensor:
        """Return the parity's own weights (B, m)."""
        return x.new_tensor(self.weights(x.shape[1])[task - self.rules.k]).expand(len(x), -1)

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        answers = self.here(outputs, size)
        missing = [i for i in range(size) if i not in answers]
        parities = [j for j in range(self.rules.r) if self.rules.k + j in outputs]
        if not missing or not parities:
            return answers
        sides = self.sides(outputs, size)
        if len(missing) <= len(parities):
            rests = torch.stack([-self.error(outputs, size, j) for j in parities], 1)
            solved = solving(self.weights(size), parities, missing)
            latents = torch.einsum("sp,bpn->bsn", rests.new_tensor(solved), rests)
            growth = np.linalg.norm(solved, axis=1)
            for place, member in enumerate(missing):
                latent = latents[:, place].unflatten(1, self.model.latent_shape)
                answers[member] = self.model.recover(latent, sides[:, member], float(growth[place]))
        elif self.rules.guesses:
            for member in missing:
                answers[member] = self.model.recover_from_side(sides[:, member])
        return answers

    @cached_property
    def empty(self) -> Tensor:
        """F of the black image, (n,)."""
        return empty_latent(self.model).flatten()

    def error(self, outputs: Mapping[int, Tensor], size: int, parity: int) -> Tensor:
        """Return the mixture of the members that are here, less a parity's latent (B, n)."""
        row = self.weights(size)[parity]
        latent = outputs[self.rules.k + parity][:, : self.latent_size]
        mixed = (1 - float(row.sum())) * self.empty - latent
        for i in range(size):
            if i in outputs:
                mixed = mixed + float(row[i]) * outputs[i]
        return mixed

    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        if any(task not in outputs for task in self.rules.tasks(size)):
            return None
        errors = torch.stack([self.error(outputs, size, j) for j in range(self.rules.r)], 1)
        return errors.square().mean((1, 2)).sqrt()


class TwoParities(CodedInvNet):
    """Coded-InvNet with two parities, around a bundle's f and g, from its E and g' trained on."""

    name = "coded-invnet-r2"
    part = "parities"
    r: ClassVar[int] = 2

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> Parities:
        return Parities(k, self.r, guesses=True)

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        super().check(k, shape, bundle)
        if bundle is None:
            return
        encoder = bundle.model.encoder
        if encoder.kind == "mosaic" or not (encoder.side_features and bundle.model.head_hidden):
            raise UserError(
                f"{self.name} needs an encoder that averages, side features and a recovery head: "
                f"bundle {bundle.name!r} has others"
            )

    def check_training(self, settings: Any, bundle: BundleInfo, k: int, train: Any) -> None:
        self.check(k, bundle.input.shape, bundle)

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        head = given.coded.recovery_head
        assert isinstance(head, RecoveryHead)
        module = nn.ModuleDict(
            {"encoder": copy.deepcopy(given.coded.encoder), "head": DoubtingHead(head)}
        )
        return module.requires_grad_(True)

    def stage(self, part: nn.Module, given: Given, lessons: Lessons) -> Stage:
        from codedinvnet.training.parities import ParitiesStage

        rows = (lessons.train_rows, lessons.validation_rows)
        model, settings = self._model(given, part), lessons.settings
        return ParitiesStage(part, model, lessons.train, *rows, given.k, self.r, settings)

    def build(self, given: Given) -> Scheme:
        self.check(given.k, given.shape, given.bundle)
        assert given.part is not None
        model = self._model(given, given.part)
        served = {SERVED: embedding_of(model)}
        return self.scheme(WeightedCode(model, given.k, self.r), given, **served)

    @staticmethod
    def _model(given: Given, part: nn.Module) -> CodedModel:
        model = with_encoder(given.coded, part.get_submodule("encoder"))
        model.recovery_head = part.get_submodule("head")  # type: ignore[assignment]
        return model
