"""Coded-InvNet's codes: a parity query that has the mean of the latents, or holds all members."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from codedinvnet.codes.base import Code, Encoded, check_k
from codedinvnet.codes.rules import SERVED, AnswersAll, CodeRules, Costs, Parities
from codedinvnet.common.errors import UserError
from codedinvnet.models.coded import CodedModel, decode_missing

Evidence = Literal["both", "latent", "side"]
"""What a decoded answer rests on: the decoded latent, the member's side features, or both."""


class LatentCode(Code):
    """What the codes around a bundle's f, g, E and g' share.

    Data tasks send f(x_i), flattened; the parity sends f(E(x_1..x_m)) and, behind it, the members'
    side features if the encoder has any.

    Args:
        model: f, g, E and g', in evaluation mode.
        rules: the rules of the code.
        evidence: what decoded answers rest on; less than both is for measuring what each is worth.

    Raises:
        UserError: if k is below 2, or the model has no side features and is to use them alone.
    """

    def __init__(self, model: CodedModel, rules: CodeRules, evidence: Evidence = "both") -> None:
        check_k(rules.k)
        head = model.recovery_head
        if evidence == "side" and (head is None or not head.side_features):
            raise UserError("this model has no side features to answer from")
        self.model, self.rules, self.evidence = model, rules, evidence
        channels, height, width = model.latent_shape
        self.latent_size = channels * height * width

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Run E on the members (B, m, C, H, W)."""
        parity, side = self.model.fuse(queries)
        return Encoded(parity, side.flatten(1))

    def direct(self, output: Tensor) -> Tensor:
        """Map flattened latents (B, n) to logits (B, classes) by g."""
        return self.model.classify(output.unflatten(1, self.model.latent_shape))

    def here(self, outputs: Mapping[int, Tensor], size: int) -> dict[int, Tensor]:
        """Return logits (B, classes) of the members that sent their latent."""
        here = [i for i in range(size) if i in outputs]
        if not here:
            return {}
        logits = self.direct(torch.cat([outputs[i] for i in here]))
        return dict(zip(here, logits.chunk(len(here)), strict=True))

    def sides(self, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        """Return the members' side features (B, size, n), by the first parity; n may be 0."""
        side = outputs[min(task for task in outputs if task >= self.rules.k)][:, self.latent_size :]
        return side.reshape(len(side), size, side.shape[1] // size)

    def recovered(self, latent: Tensor, side: Tensor, size: int) -> Tensor:
        """Map a decoded latent (B, *latent_shape) and what is known of its member to logits."""
        if self.evidence == "latent":
            return self.model.recover_from_latent(latent, side, size)
        if self.evidence == "side":
            return self.model.recover_from_side(side)
        return self.model.recover(latent, side, size)


class MeanCode(LatentCode):
    """One parity per group (Dinh & Lee, ICML 2021, section 3).

    One missing member is decoded by subtraction. For several, their side features alone answer
    (`guesses`), unless the encoder has none.
    """

    def __init__(self, model: CodedModel, k: int, evidence: Evidence = "both") -> None:
        head = model.recovery_head
        guesses = head is not None and head.side_features > 0 and evidence != "latent"
        super().__init__(model, Parities(k, guesses=guesses), evidence)

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members that sent their latent, and the missing ones as well as can be."""
        answers = self.here(outputs, size)
        missing = sorted(set(range(size)) - answers.keys())
        if not missing or self.rules.k not in outputs:
            return answers
        sides = self.sides(outputs, size)
        if len(missing) == 1:
            answers[missing[0]] = self.decoded(outputs, missing[0], sides, size)
        elif self.rules.guesses:
            for member in missing:
                answers[member] = self.model.recover_from_side(sides[:, member])
        return answers

    def decoded(
        self, outputs: Mapping[int, Tensor], member: int, sides: Tensor, size: int
    ) -> Tensor:
        """Return logits (B, classes) of the one missing member."""
        latent = self.subtracted(outputs, size).unflatten(1, self.model.latent_shape)
        return self.recovered(latent, sides[:, member], size)

    def subtracted(self, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        """Return the latent (B, n) of the one missing member."""
        latent = outputs[self.rules.k][:, : self.latent_size]
        others = [outputs[i] for i in range(size) if i in outputs]
        return decode_missing(
            latent, torch.stack(others, dim=1) if others else latent[:, None][:, :0]
        )


def mosaic_rules(k: int) -> AnswersAll:
    """Return the rules of a mosaic: its one parity, one image, answers for any members."""
    return AnswersAll(k, SERVED, encoded=True, cost=Costs(group=1.0))


class MosaicCode(LatentCode):
    """One parity per group, of which each member's cell is read (docs/decisions/25-mosaic.md).

    There is no sum to subtract the others from, so that the parity alone answers for everybody.
    """

    def __init__(self, model: CodedModel, k: int, evidence: Evidence = "both") -> None:
        super().__init__(model, mosaic_rules(k), evidence)

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members that sent their latent, and with the parity here all others."""
        answers = self.here(outputs, size)
        if self.rules.k in outputs and len(answers) < size:
            for member, logits in self._read(outputs, size).items():
                answers.setdefault(member, logits)
        return answers

    def _read(self, outputs: Mapping[int, Tensor], size: int) -> dict[int, Tensor]:
        """Return logits (B, classes) of all members from the parity alone."""
        latent = outputs[self.rules.k][:, : self.latent_size]
        latent = latent.unflatten(1, self.model.latent_shape)
        known = self.model.parity(latent, self.sides(outputs, size)).side
        return {i: self.recovered(latent, known[:, i], size) for i in range(size)}
