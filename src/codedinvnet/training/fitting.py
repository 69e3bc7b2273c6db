"""What `Method.fit` trains with: images, the teacher's answers, and a folder that resumes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet.common.config import Settings
from codedinvnet.data import ImageSource
from codedinvnet.models.checkpoint import PART, load_checkpoint, module_tensors, save_checkpoint
from codedinvnet.models.coded import prepare
from codedinvnet.training.loop import BEST, LAST, LATEST, Stage, differing_keys, train_stage


@dataclass(frozen=True)
class TrainingData:
    """Images with their teacher's answers, and where the training is kept.

    Attributes:
        images: the training images.
        train_rows: the rows of `images` to train on, (N,).
        validation_rows: the rows of `images` to validate on, (V,).
        logits: returns the teacher's logits of "train" or "validation", (N or V, classes) on the
            CPU, in the order of these rows.
        settings: how the teacher was trained: augmentation, precision.
        seed: of the training.
        device: what to compute on.
        made_with: what the part depends on; see `Method.made_with`. Checkpoints state it.
        folder: where checkpoints go.
    """

    images: ImageSource
    train_rows: Tensor
    validation_rows: Tensor
    logits: Callable[[str], Tensor]
    settings: Settings
    seed: int
    device: torch.device
    made_with: Mapping[str, Any]
    folder: Path

    def groups(self, split: str, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return groups at places (G, k) in the rows of a split, "train" or "validation".

        They are images (G, k, C, H, W) as floats, the teacher's logits (G, k, classes), and labels.
        """
        rows = self.train_rows if split == "train" else self.validation_rows
        images, labels = self.images.batch(rows[places.flatten()])
        x = prepare(images.to(self.device), 0).unflatten(0, tuple(places.shape))
        logits = self.logits(split)[places].to(self.device)
        return x, logits, labels.view_as(places).to(self.device)

    def train(self, stage: Stage, epochs: int) -> nn.Module:
        """Run a stage, or what is left of it, and return its part in evaluation mode.

        It starts over if the folder has a training with other settings.
        """
        part = stage.modules[PART]  # where the next command looks for it
        resume, last, settings = 0, self.folder / LAST, self.made_with
        if last.is_file() and not differing_keys(load_checkpoint(last)[1]["settings"], settings):
            resume = LATEST
        train_stage(
            stage, self.folder, epochs=epochs, seed=self.seed, settings=settings, resume=resume
        )
        return part.eval()

    def keep(self, part: nn.Module, seconds: float) -> None:
        """Write the checkpoints of a part that was trained without `train`, as finished."""
        header = {"settings": dict(self.made_with), "epoch": sys.maxsize, "seconds": seconds}
        for name in (LAST, BEST):
            save_checkpoint(self.folder / name, module_tensors({PART: part}), header)
