"""The oracle: the exact inverse in place of the fusion encoder."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from codedinvnet.methods.coded_invnet import CodedInvNet
from codedinvnet.model import CodedModel, decode_missing

TOLERANCE = 1e-5
"""Of each block's inverse; the decoded latent's error is k times as large."""


class Oracle(CodedInvNet):
    """Coded-InvNet whose parity query is f⁻¹(mean z): the ceiling of the approach.

    It shows what a perfect encoder would reach (Dinh & Lee, section 3.2). To make its parity, all
    members are embedded and their mean is inverted, which costs far more than answering them:
    nobody would serve it. A decoded latent is nearly the true one, so g classifies it. If f pads
    injectively, the mean has no exact preimage, and the ceiling is lower.
    """

    name = "oracle"

    def __init__(self, model: CodedModel, k: int) -> None:
        super().__init__(model, k)
        self.keeps_apart = self.guesses = False  # its parity is a mean, whatever E makes

    @torch.inference_mode()
    def compute(self, task: int, queries: Tensor) -> Tensor:
        """Embed one member (B, 1, C, H, W), or f⁻¹ of the members' mean latent.

        Raises:
            NotConverged: if a mean cannot be inverted.
        """
        if task < self.k:
            return super().compute(task, queries)
        queries = queries.to(self.device)
        began = time.perf_counter()
        latents = self.model.embed(queries.flatten(0, 1)).unflatten(0, queries.shape[:2])
        parity = self.model.network.inverse(latents.mean(dim=1), tolerance=TOLERANCE)
        self.model.encode_seconds = time.perf_counter() - began
        z: Tensor = self.model.network(parity)
        return z.flatten(1)

    @torch.inference_mode()
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members that sent their latent, and the missing one if it is alone."""
        here = {i: outputs[i] for i in range(size) if i in outputs}
        latents = dict(here)
        missing = [i for i in range(size) if i not in here]
        if len(missing) == 1 and self.k in outputs:
            parity = outputs[self.k]
            others = torch.stack(list(here.values()), 1) if here else parity[:, None][:, :0]
            latents[missing[0]] = decode_missing(parity, others)
        return {i: self.direct(z) for i, z in latents.items()}
