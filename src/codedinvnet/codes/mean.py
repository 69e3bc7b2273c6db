"""Coded-InvNet's code: a parity query whose latent is the mean of the members'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codedinvnet.codes.base import Code, check_k
from codedinvnet.codes.rules import Parities
from codedinvnet.models.coded import CodedModel, decode_missing


class MeanCode(Code):
    """One parity per group (Dinh & Lee, ICML 2021, section 3).

    Data tasks send f(x_i), flattened; the parity sends f(E(x_1..x_m)). One missing member's latent
    is decoded by subtraction and classified by g.

    Args:
        model: f, g and E, in evaluation mode.
        k: the most members of a group.

    Raises:
        UserError: if k is below 2.
    """

    def __init__(self, model: CodedModel, k: int) -> None:
        check_k(k)
        self.model, self.rules = model, Parities(k)

    def encode(self, task: int, queries: Tensor) -> Tensor:
        """Run E on the members (B, m, C, H, W)."""
        return self.model.fuse(queries)

    def direct(self, output: Tensor) -> Tensor:
        """Map flattened latents (B, n) to logits (B, classes) by g."""
        return self.model.classify(output.unflatten(1, self.model.latent_shape))

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members that sent their latent, and the missing one if there is only one."""
        latents = {i: outputs[i] for i in range(size) if i in outputs}
        if len(latents) == size - 1 and self.rules.k in outputs:
            (missing,) = set(range(size)) - latents.keys()
            parity = outputs[self.rules.k]
            others = torch.stack([*latents.values()], 1) if latents else parity[:, None][:, :0]
            latents[missing] = decode_missing(parity, others)
        if not latents:
            return {}
        logits = self.direct(torch.cat([*latents.values()]))
        return dict(zip(latents, logits.chunk(len(latents)), strict=True))
