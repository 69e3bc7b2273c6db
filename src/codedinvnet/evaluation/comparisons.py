"""Approximate answers beside direct ones: what a bound on disagreement is calibrated with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import is_systematic
from codedinvnet.data import ImageSource, random_groups
from codedinvnet.devices import whole_float32
from codedinvnet.errors import UserError
from codedinvnet.evaluation.outputs import BATCH, Outputs, each_missing, group_outputs, task_outputs
from codedinvnet.trust.calibration import DECODED, GUESSED
from codedinvnet.trust.confidence import confidences


@dataclass(frozen=True)
class Answered:
    """Labels and confidences of approximate answers, (G, k) each."""

    labels: np.ndarray
    confidences: np.ndarray

    @classmethod
    def of(cls, scores: Tensor) -> Answered:
        """Make them of logits (G, k, classes), as the service tells them."""
        labels = scores.argmax(2).numpy()
        found = confidences(scores.flatten(0, 1).numpy(), "logits")
        return cls(labels, found.astype(np.float64).reshape(labels.shape))


@dataclass(frozen=True)
class Comparisons:
    """Groups of images, and what was answered for each member in two ways.

    Attributes:
        members: (G, k), rows of the images.
        direct: (G, k), labels of the members' own answers.
        decoded: answers that were decoded as if the member alone were missing.
        guessed: answers from the extra tasks alone, as if all members were missing; None if the
            code has none.
    """

    members: np.ndarray
    direct: np.ndarray
    decoded: Answered
    guessed: Answered | None

    def kinds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the confidences of each kind of answer, and whether they agree, (G, k) each."""
        kinds = {DECODED: self.decoded, GUESSED: self.guessed}
        return {
            name: (answers.confidences, answers.labels == self.direct)
            for name, answers in kinds.items()
            if answers is not None
        }


@torch.inference_mode()
def compare(
    scheme: Scheme,
    source: ImageSource,
    *,
    k: int,
    groupings: int = 1,
    seed: int = 0,
    own: Tensor | None = None,
) -> Comparisons:
    """Answer for every member of random groups as if it were missing.

    Images that only fill up a last group are left out with their whole group.

    Args:
        scheme: the scheme of a systematic code.
        source: the images.
        k: the group size.
        groupings: how many random groupings.
        seed: the seed of the random groupings.
        own: `task_outputs`, if they are known.

    Raises:
        UserError: if there are too few images, or the method has no direct answers.
    """
    if not is_systematic(scheme.rules):
        raise UserError(f"{scheme.name} has no direct answers to compare with")
    generator = torch.Generator().manual_seed(seed)
    drawn = [random_groups(len(source), k, generator) for _ in range(groupings)]
    members = torch.cat([groups.members[groups.counted.all(1)] for groups in drawn])
    with whole_float32():
        if own is None:
            own = task_outputs(scheme, source)
        outputs = group_outputs(scheme, source, members, own)
        return Comparisons(members.numpy(), *answered_both_ways(scheme, outputs, k))


def answered_both_ways(
    scheme: Scheme, outputs: dict[int, Outputs], k: int
) -> tuple[np.ndarray, Answered, Answered | None]:
    """Return direct labels (G, k), decoded answers, and guesses, of the outputs (G, n) of tasks."""
    extra = frozenset(outputs) - frozenset(range(k))
    guesses_all = scheme.rules.guesses or len(scheme.rules.recoverable(extra, k)) == k
    direct, decoded, guessed = [], [], []
    for rows in torch.arange(len(outputs[k])).split(BATCH):
        here = {task: output[rows].to(scheme.device) for task, output in outputs.items()}
        own = [scheme.direct(here[i]) for i in range(k)]
        labels = [scores.argmax(1).cpu() for scores in own if scores is not None]
        direct.append(torch.stack(labels, 1))
        decoded.append(each_missing(scheme, here, k))
        if guesses_all:
            guesses = scheme.decode({task: here[task] for task in extra}, k)
            guessed.append(torch.stack([guesses[i].cpu() for i in range(k)], 1))
    return (
        torch.cat(direct).numpy(),
        Answered.of(torch.cat(decoded)),
        Answered.of(torch.cat(guessed)) if guessed else None,
    )
