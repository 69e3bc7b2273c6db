"""The training of a code around a frozen model, and its answers when one member is missing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.config import PartSettings
from codedinvnet.models.coded import decode_each, shared_error
from codedinvnet.protect.distil import BudgetStage, Lesson
from codedinvnet.protect.frozen import Evidence, FrozenCoder
from codedinvnet.protect.inputs import Inputs
from codedinvnet.training.precision import autocast

FULL = 0.5
"""Share of the steps with full groups; the others have some size from 2 on."""
ALONE, LATENT = 0.3, 0.05
"""Weights of answers from either evidence alone, and of the square of the decoded scores' error."""
GROUPS = 25

Scores = Callable[[Tensor], Tensor]


class CodingStage(BudgetStage):
    """Train E and the recovery head through a model that stays as it is.

    Args:
        coder: trained in place.
        scores: the model's of queries, through which gradients flow.
        lesson: its inputs, and the model's answers.
        k: members of a full group.
        part: how to train; a batch is of so many members.
        seconds: see `BudgetStage`.
    """

    name = "code"

    def __init__(
        self,
        coder: FrozenCoder,
        scores: Scores,
        lesson: Lesson,
        k: int,
        part: PartSettings,
        seconds: float,
    ) -> None:
        super().__init__(coder, lesson, part, seconds, coder.shape.kind != "vectors")
        self.coder, self.scores, self.k = coder, scores, k

    def batch_loss(self, index: int) -> Tensor:
        rows = self.rows(index)
        size = self.k
        if float(torch.rand((), generator=self.generator)) > FULL:
            size = int(torch.randint(2, self.k + 1, (), generator=self.generator))
        rows = rows[: max(1, len(rows) // size) * size]
        (array,) = self.lesson.inputs.batch(rows).values()
        x, wanted = torch.from_numpy(array), self.lesson.teacher[rows]
        if self.lesson.flip and self.lesson.mirrored is not None:
            x = x.permute(0, 3, 1, 2) if self.coder.last else x
            x, wanted = self.mirrored(x, wanted, rows)
            x = x.permute(0, 2, 3, 1) if self.coder.last else x
        with autocast(self.precision, self.device):
            encoding = self.coder.encode(x.unflatten(0, (-1, size)))
            parity = self.scores(encoding.parity).float()
        soft = torch.from_numpy(wanted)
        own = self.level(soft).unflatten(0, (-1, size))
        error = shared_error(self.coder.level(parity), own)
        decoded = (own + error[:, None]).flatten(0, 1)
        side = encoding.side.flatten(0, 1)
        soft = soft.softmax(1)
        loss = F.cross_entropy(self.coder.answer(decoded, side, size), soft)
        evidence: Evidence
        for evidence in ("scores", "side"):
            alone = self.coder.answer(decoded, side, size, evidence)
            loss = loss + ALONE * F.cross_entropy(alone, soft)
        loss = loss + LATENT * error.square().mean() / size
        return loss

    def level(self, logs: Tensor) -> Tensor:
        """Return the coder's level of the model's log-probabilities."""
        return self.coder.level(logs.exp() if self.coder.scores == "probabilities" else logs)

    def agreement(self) -> float:
        rows = self.lesson.validation
        rows = rows[: max(1, len(rows) // self.k) * self.k]
        levels = self.level(torch.from_numpy(self.lesson.teacher))
        logits = decoded_logits(self.coder, self.scores, self.lesson.inputs, rows, levels, self.k)
        return float((logits.argmax(1) == self.lesson.teacher[rows].argmax(1)).mean())


@torch.no_grad()
def decoded_logits(
    coder: FrozenCoder,
    scores: Scores,
    inputs: Inputs,
    rows: np.ndarray,
    levels: Tensor,
    k: int,
    evidence: Evidence = "both",
) -> np.ndarray:
    """Return the logits (N, classes) of each of some inputs, as if it alone were missing.

    Args:
        coder: E and the recovery head, in evaluation mode.
        scores: the model's.
        inputs: all queries.
        rows: which, a multiple of k; each k of them are a group.
        levels: the levels of the model's scores of all inputs.
        k: members of a group.
        evidence: the evidence that answers rest on.
    """
    found = []
    for part in np.split(rows, range(GROUPS * k, len(rows), GROUPS * k)):
        (array,) = inputs.batch(part).values()
        encoding = coder.encode(torch.from_numpy(array).unflatten(0, (-1, k)))
        own = levels[torch.from_numpy(part)].unflatten(0, (-1, k))
        decoded = decode_each(coder.level(scores(encoding.parity)), own).flatten(0, 1)
        found.append(coder.answer(decoded, encoding.side.flatten(0, 1), k, evidence).numpy())
    return np.concatenate(found)
