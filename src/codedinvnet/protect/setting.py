"""What a protection is asked for, and what the model said of its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from codedinvnet.codes.registry import UNTRAINED
from codedinvnet.data import spread_rows
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.protect.folder import SMALL
from codedinvnet.protect.images import Preprocessing
from codedinvnet.protect.inputs import Inputs, Split

WORK = "work"
"""In the folder of a protection that is not finished: what was asked, and checkpoints."""


@dataclass(frozen=True)
class ProtectOptions:
    """What `codedinvnet protect` is asked for.

    Attributes:
        source: the served model.
        inputs: see `read_inputs`.
        out: the folder of the protection.
        k: queries in a group.
        minutes: the time for asking the model and training together.
        seed: the seed of the split and the training.
        labels: see `read_inputs`.
        how: how images are prepared.
        flip: whether images may be mirrored in training.
        shift: pixels by which images may be shifted in training.
        backup: the user's own smaller model; None: there is none.
        methods: the names of the methods that are measured.
    """

    source: ModelSource
    inputs: Path
    out: Path
    k: int = 10
    minutes: float = 30.0
    seed: int = 0
    labels: Path | None = None
    how: Preprocessing = field(default_factory=Preprocessing)
    flip: bool = True
    shift: int | None = None
    backup: str | None = None
    methods: tuple[str, ...] = (SMALL, *UNTRAINED)


@dataclass(frozen=True)
class Setting:
    """A model with its inputs, and what it said of them.

    Attributes:
        model: the served model.
        inputs: all queries, none of them twice.
        rows: their split.
        scores: the model's, (N, classes).
        macs: the model's multiply-adds for a query; None if they cannot be counted.
        work: folder for what is not finished.
        repeated: inputs that were left out, since they repeat others.
    """

    model: OpenModel
    inputs: Inputs
    rows: Split
    scores: np.ndarray
    macs: int | None
    work: Path
    repeated: int = 0

    @property
    def correctness(self) -> str:
        """How often the model is right, of the inputs of the table; "" without labels."""
        if self.inputs.labels is None:
            return ""
        rows = self.rows.test
        share = float((self.answers[rows] == self.inputs.labels[rows]).mean())
        return (
            f"the model itself is right in {share:.1%} of the table's inputs: if you know it as "
            "better, these are prepared otherwise than clients prepare theirs"
        )

    @property
    def kind(self) -> str:
        """What the scores are."""
        assert self.model.signature.scores is not None
        return self.model.signature.scores.kind

    @property
    def repetition(self) -> str:
        """What a reader must know of inputs that repeat others; "" if there are none."""
        if not self.repeated:
            return ""
        count = self.repeated + len(self.inputs)
        return (
            f"{self.repeated} of {count} inputs ({100 * self.repeated / count:.1f} %) repeat "
            "others: each different one counts once here, so where traffic repeats a few of them, "
            "agreement may be lower, and a limit on disagreement exceeded"
        )

    def spread(self, count: int) -> np.ndarray:
        """Return so many training rows, evenly spread: the first ones may be of few classes."""
        return spread_rows(torch.from_numpy(self.rows.train), count).numpy()

    @property
    def answers(self) -> np.ndarray:
        """The model's answers to all inputs, (N,)."""
        answers: np.ndarray = self.scores.argmax(axis=1)
        return answers
