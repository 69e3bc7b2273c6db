"""Coded-InvNet: a parity query whose latent is the mean of the group's latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from codedinvnet.devices import first_tensor
from codedinvnet.errors import UserError
from codedinvnet.methods.base import check_k
from codedinvnet.model import CodedModel, decode_missing, with_encoder
from codedinvnet.nn.fusion import PixelMean

Evidence = Literal["both", "latent", "side"]
"""What a decoded answer rests on: the decoded latent, the member's side features, or both."""


class CodedInvNet:
    """One parity per group (Dinh & Lee, ICML 2021, section 3).

    Data tasks send f(x_i), flattened; the parity sends f(E(x_1..x_m)) and, behind it, the members'
    side features if the encoder has any. One missing member is decoded. For several, their side
    features alone answer (`guesses`), unless the encoder has none or keeps the members apart.

    Args:
        model: f, g, E and g', in evaluation mode.
        k: the most queries in a group.
        evidence: what decoded answers rest on; less than both is for measuring what each is worth.

    Raises:
        UserError: if k is below 2, or the model has no side features and is to use them alone.
    """

    name = "coded-invnet"
    r = 1
    fixed_size = False

    def __init__(self, model: CodedModel, k: int, evidence: Evidence = "both") -> None:
        check_k(k)
        head = model.recovery_head
        if evidence == "side" and (head is None or not head.side_features):
            raise UserError("this model has no side features to answer from")
        self.model = model
        self.k = k
        self.evidence = evidence
        self.keeps_apart = model.encoder.keeps_apart
        channels, height, width = model.latent_shape
        self.latent_size = channels * height * width
        has_side = head is not None and head.side_features > 0
        has_side = has_side and not isinstance(model.encoder, PixelMean)  # whose are zeros
        self.guesses = has_side and evidence != "latent" and not self.keeps_apart
        self.device = first_tensor(model).device
        self.parameters = sum(p.numel() for p in model.parameters())

    @property
    def encode_seconds(self) -> float:
        """How long E took in the last parity task."""
        return self.model.encode_seconds

    def tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return one task a member, and the parity as task k over all of them."""
        if not 1 <= size <= self.k:
            raise ValueError(f"a group has 1 to {self.k} members, got {size}")
        return {**{i: (i,) for i in range(size)}, self.k: tuple(range(size))}

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members that answered, and with z_p here all, or a missing one alone."""
        here = frozenset(i for i in range(size) if i in available)
        decodable = self.k in available and (self.keeps_apart or len(here) >= size - 1)
        return frozenset(range(size)) if decodable else here

    @torch.inference_mode()
    def compute(self, task: int, queries: Tensor) -> Tensor:
        """Embed one member (B, 1, C, H, W), or encode and embed the parity (B, m, C, H, W)."""
        queries = queries.to(self.device)
        if task < self.k:
            return self.model.embed(queries[:, 0]).flatten(1)
        parity = self.model.encode(queries)
        return torch.cat([parity.latent.flatten(1), parity.side.flatten(1)], dim=1)

    @torch.inference_mode()
    def direct(self, output: Tensor) -> Tensor:
        """Map latents (B, n) to logits (B, classes)."""
        return self.model.classify(output.unflatten(1, self.model.latent_shape))

    @torch.inference_mode()
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members that sent their latent, and the missing ones as well as can be."""
        here = [i for i in range(size) if i in outputs]
        answers: dict[int, Tensor] = {}
        if here:
            logits = self.direct(torch.cat([outputs[i] for i in here]))
            answers = dict(zip(here, logits.chunk(len(here)), strict=True))
        missing = set(range(size)) - answers.keys()
        determined = self.recoverable(frozenset(outputs), size)
        if self.guesses and self.k in outputs and not missing <= determined:
            for member in sorted(missing):
                answers[member] = self.model.recover_from_side(self._side(outputs, member, size))
            return answers
        for member in sorted(missing & determined):
            answers[member] = self._decoded(outputs, member, size)
        return answers

    def _decoded(self, outputs: Mapping[int, Tensor], member: int, size: int) -> Tensor:
        """Return logits (B, classes) of a missing member."""
        latent = outputs[self.k][:, : self.latent_size]
        if not self.keeps_apart:
            others = [outputs[i] for i in range(size) if i in outputs]
            stacked = torch.stack(others, dim=1) if others else latent[:, None][:, :0]
            latent = decode_missing(latent, stacked)
        own = self._side(outputs, member, size)
        return self._recovered(latent.unflatten(1, self.model.latent_shape), own, size)

    def _side(self, outputs: Mapping[int, Tensor], member: int, size: int) -> Tensor:
        """Return a member's vector of `Parity.side` (B, n); (B, 0) if the encoder has none."""
        side = outputs[self.k][:, self.latent_size :]
        return side.unflatten(1, (size, -1))[:, member] if side.shape[1] else side

    def _recovered(self, latent: Tensor, side: Tensor, size: int) -> Tensor:
        if self.evidence == "latent":
            return self.model.recover_from_latent(latent, side, size)
        if self.evidence == "side":
            return self.model.recover_from_side(side)
        return self.model.recover(latent, side, size)

    @torch.inference_mode()
    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        """Return the root mean square of z_p − mean z, (B,).

        If the encoder keeps the members apart, the largest of the members' decoded logits − direct
        logits.
        """
        if self.k not in outputs or any(i not in outputs for i in range(size)):
            return None
        if self.keeps_apart:
            distances = [
                (self._decoded(outputs, i, size) - self.direct(outputs[i])).square().mean(dim=1)
                for i in range(size)
            ]
            return torch.stack(distances).amax(dim=0).sqrt()
        mean = torch.stack([outputs[i] for i in range(size)]).mean(dim=0)
        difference = outputs[self.k][:, : self.latent_size] - mean
        return difference.square().mean(dim=1).sqrt()


class PaperInvNet(CodedInvNet):
    """Coded-InvNet as it was published, around a bundle's f and g.

    Dinh & Lee, ICML 2021, sections 3.2 and 3.3.

    E was trained for groups of k on the pixels of f⁻¹(mean z), against a discriminator. A missing
    member's latent is decoded by subtraction and classified by g: there is neither a recovery head
    nor a side feature.

    Args:
        model: f, g and E, without g', in evaluation mode.
        k: the most queries in a group.

    Raises:
        UserError: if k is below 2.
    """

    name = "coded-invnet-paper"

    def __init__(self, model: CodedModel, k: int) -> None:
        super().__init__(model, k)


class AverageImage(PaperInvNet):
    """The average image in place of E, around a bundle's f and g: what an encoder must beat.

    It is what the mean of the latents would be for a linear f (Dinh & Lee, section 3.2, motivate E
    by f's not being so). Its parity costs next to nothing to make.

    Args:
        model: f and g, in evaluation mode; its E and g' are left out.
        k: the most queries in a group.

    Raises:
        UserError: if k is below 2.
    """

    name = "average-image"

    def __init__(self, model: CodedModel, k: int) -> None:
        super().__init__(with_encoder(model, PixelMean()), k)
