"""The mosaic: a parity query that holds the group's members side by side, each in its own cell."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from codedinvnet.codes.mean import Evidence, LatentCode
from codedinvnet.codes.rules import SERVED, AnswersAll, Costs
from codedinvnet.models.coded import CodedModel


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
