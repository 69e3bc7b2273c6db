"""Coded-InvNet: a parity query whose latent is the mean of the group's latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from codedinvnet.errors import UserError
from codedinvnet.model import CodedModel, decode_missing

Evidence = Literal["both", "latent", "side"]
"""What a decoded answer rests on: the decoded latent, the member's side features, or both."""


class CodedInvNet:
    """One parity per group (Dinh & Lee, ICML 2021, section 3).

    Data tasks send f(x_i), flattened; the parity sends f(E(x_1..x_m)) and, behind it, the members'
    side features if the encoder has any. One missing member is decoded.

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
        if k < 2:
            raise UserError(f"k must be at least 2, got {k}: a group of one is a plain copy")
        head = model.recovery_head
        if evidence == "side" and (head is None or not head.side_features):
            raise UserError("this model has no side features to answer from")
        self.model = model
        self.k = k
        self.evidence = evidence
        channels, height, width = model.latent_shape
        self.latent_size = channels * height * width
        self.device = next(model.parameters()).device
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
        """Return the members that answered, and the missing one if it is alone and z_p is here."""
        here = frozenset(i for i in range(size) if i in available)
        return frozenset(range(size)) if len(here) >= size - 1 and self.k in available else here

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
        """Answer the members that sent their latent, and the missing one if it is alone."""
        here = [i for i in range(size) if i in outputs]
        answers: dict[int, Tensor] = {}
        if here:
            logits = self.direct(torch.cat([outputs[i] for i in here]))
            answers = dict(zip(here, logits.chunk(len(here)), strict=True))
        missing = [i for i in range(size) if i not in outputs]
        if len(missing) == 1 and self.k in outputs:
            packed = outputs[self.k]
            parity, side = packed[:, : self.latent_size], packed[:, self.latent_size :]
            others = [outputs[i] for i in range(size) if i in outputs]
            stacked = torch.stack(others, dim=1) if others else parity[:, None][:, :0]
            latent = decode_missing(parity, stacked).unflatten(1, self.model.latent_shape)
            member = side.unflatten(1, (size, -1))[:, missing[0]] if side.shape[1] else side
            answers[missing[0]] = self._recovered(latent, member, size)
        return answers

    def _recovered(self, latent: Tensor, side: Tensor, size: int) -> Tensor:
        if self.evidence == "latent":
            return self.model.recover_from_latent(latent, size)
        if self.evidence == "side":
            return self.model.recover_from_side(side)
        return self.model.recover(latent, side, size)

    @torch.inference_mode()
    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        """Return the root mean square of z_p − mean z, (B,)."""
        if self.k not in outputs or any(i not in outputs for i in range(size)):
            return None
        mean = torch.stack([outputs[i] for i in range(size)]).mean(dim=0)
        difference = outputs[self.k][:, : self.latent_size] - mean
        return difference.square().mean(dim=1).sqrt()
