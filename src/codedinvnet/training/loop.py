"""The loop that every training stage runs in.

It owns what the stages share: epochs, a progress bar with the time left, TensorBoard, checkpoints
that resume after a kill, and the choice of the best epoch on the validation split. All randomness
of an epoch comes from the seed and the epoch's number, so a resumed run repeats an unbroken one.
"""

from __future__ import annotations

import fcntl
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from codedinvnet.common.devices import denormals_flushed
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import free_backup_name
from codedinvnet.common.progress import Progress
from codedinvnet.common.provenance import describe_command, describe_commit, describe_machine
from codedinvnet.models.checkpoint import (
    load_checkpoint,
    load_modules,
    load_optimizers,
    module_tensors,
    optimizer_tensors,
    save_checkpoint,
)

LAST, BEST = "last.safetensors", "best.safetensors"
"""A stage's checkpoints: of its last epoch, and of the one that validated best."""
LATEST = -1
"""As `resume`: go on from the newest checkpoint, if there is one."""
ORIGIN = "origin"
"""In a checkpoint's header: the command, commit and machine that trained it."""

WARMUP = 0.1
"""Share of a training's steps in which its rate rises, unless settings say otherwise."""
NETWORK_WEIGHTS = "network_weights"
"""In headers, and in settings of what depends on a trained network: the digest of its weights."""
IMAGES = "images"
"""In settings of a trained network: the digest of its training images, in their order."""


class Stage(ABC):
    """One thing to train, by steps whose rate rises linearly and then falls along a half cosine.

    Args:
        modules: what is trained and kept, by name.
        optimizers: what is kept of how it is trained, by name.
        rate: the highest learning rate.
        epochs: how many are planned.
        steps_per_epoch: the steps of each.
        warmup: the share of all steps in which the rate rises.
    """

    name: str
    gradient_norm: float | None = None
    """Longer gradients are scaled down to this norm; None leaves them."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        rate: float,
        epochs: int,
        steps_per_epoch: int,
        warmup: float = WARMUP,
    ) -> None:
        self.modules, self.optimizers, self.rate = modules, optimizers, rate
        self.steps_per_epoch, self.warmup = steps_per_epoch, warmup
        self.total_steps = epochs * steps_per_epoch
        self.generator = torch.Generator()
        self.terms: Mapping[str, Tensor] = {}

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Prepare an epoch; every random choice in it must come from the generator."""
        self.generator = generator

    @abstractmethod
    def batch_loss(self, index: int) -> Tensor:
        """Draw the epoch's batch of this index and return its loss.

        What is to be shown in the loss's place goes into `terms`.
        """

    def set_rate(self, epoch: int, index: int) -> None:
        """Set the learning rate of a step."""
        step = epoch * self.steps_per_epoch + index
        rate = self.rate * warmup_cosine(step, self.total_steps, self.warmup)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        """Do one step of the first optimiser and return scalars to show."""
        self.set_rate(epoch, index)
        loss = self.batch_loss(index)
        optimizer = next(iter(self.optimizers.values()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.gradient_norm is not None:
            parameters = (p for module in self.modules.values() for p in module.parameters())
            nn.utils.clip_grad_norm_(parameters, self.gradient_norm)
        optimizer.step()
        shown = self.terms or {"loss": loss}
        return {name: float(value.detach()) for name, value in shown.items()}

    @abstractmethod
    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Return a score, higher is better, and scalars to show, from the validation split."""


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Return the factor of the learning rate: up linearly, then down a half cosine to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def make_optimizer(
    modules: Iterable[nn.Module], rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that are trained; only matrices and kernels decay."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)


def starts_over(folder: Path, resume: int) -> bool:
    """Tell whether a training starts over; one whose epoch to resume is not there does not."""
    return not resume or (resume == LATEST and not (folder / LAST).is_file())


def set_aside(folder: Path, *more: str) -> None:
    """Move the checkpoints of a training that starts over: its hours may be wanted after all."""
    found = [path for name in (LAST, BEST, *more) if (path := folder / name).is_file()]
    if found:
        kept = free_backup_name(folder / "checkpoints")
        kept.mkdir()
        for path in found:
            path.replace(kept / path.name)
        Progress.write(f"{folder}: starts over; the old checkpoints are in {kept}", file=sys.stderr)


@denormals_flushed()
def train_stage(
    stage: Stage,
    folder: Path | None = None,
    *,
    epochs: int,
    seed: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
    resume: int = 0,
    keep: Mapping[str, Any] | None = None,
    replan: Callable[[int, float], int] | None = None,
) -> dict[str, Any]:
    """Train a stage for `epochs` epochs, and leave its modules as they validated best.

    Args:
        stage: the stage to train.
        folder: where checkpoints, `last` and `best`, and TensorBoard files go; None: nowhere.
        epochs: how many epochs in all.
        seed: the seed of everything random.
        settings: what the result depends on; a checkpoint with other settings is not resumed.
        resume: 0 from the start, n from the checkpoint after epoch n, LATEST from the newest.
        keep: further entries for the checkpoints' headers.
        replan: maps the epochs done, and their seconds, to the number of epochs in all, for a
            training within a budget of time.

    Returns:
        The header of the best checkpoint, with the seconds of all epochs, those behind it, too.
    """
    start, seconds, best_score = 0, 0.0, -math.inf
    best: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    origin = {
        "command": describe_command(),
        "commit": describe_commit(),
        "machine": describe_machine(),
    }
    with ExitStack() as held:
        if folder is not None and starts_over(folder, resume):
            folder.mkdir(parents=True, exist_ok=True)
            _keep_others_out(folder, held)
            set_aside(folder)
        elif folder is not None:
            _keep_others_out(folder, held)
            tensors, header = load_checkpoint(folder / LAST)
            _check_resumable(header, settings, folder / LAST, resume)
            load_modules(stage.modules, tensors, folder / LAST)
            load_optimizers(stage.optimizers, tensors)
            start, seconds, best_score = header["epoch"], header["seconds"], header["best_score"]
        if replan and start:
            epochs = replan(start, seconds)
        board = None
        if folder is not None and start < epochs:
            # What is kept ends before this step, and epoch `start` was written as step `start`.
            board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
            held.callback(board.close)
        bar = held.enter_context(
            Progress(
                total=epochs * stage.steps_per_epoch,
                initial=start * stage.steps_per_epoch,
                desc=stage.name,
                unit="step",
                dynamic_ncols=True,
                mininterval=1.0,
                watched=True,
            )
        )
        epoch = start
        while epoch < epochs:
            began = time.monotonic()
            mean, score, scalars = _epoch(stage, epoch, seed, bar)
            seconds += time.monotonic() - began
            if not all(math.isfinite(v) for v in [*mean.values(), score]):
                kept = f" The checkpoint of epoch {epoch} is untouched." if epoch and folder else ""
                raise UserError(
                    f"{stage.name}: the loss is not finite in epoch {epoch + 1}; "
                    f"lower the learning rate.{kept}"
                )
            epoch += 1
            shown = {**mean, **scalars}
            times = (seconds, seconds / epoch * (epochs - epoch))
            took, left = map(Progress.format_interval, times)
            told = ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
            bar.write(
                f"{stage.name} epoch {epoch}/{epochs} ({took}, {left} left): {told}",
                file=sys.stderr,
            )
            header = {
                "stage": stage.name,
                "settings": dict(settings),
                "epoch": epoch,
                "epochs": epochs,
                "seconds": seconds,
                "score": score,
                "validation": dict(scalars),
                ORIGIN: origin,
                **(keep or {}),
            }
            tensors = module_tensors(stage.modules)
            if is_best := score > best_score:
                best_score = score
            if folder is None:
                if is_best:
                    best = {key: value.clone() for key, value in tensors.items()}, header
            else:
                assert board is not None
                for key, value in shown.items():
                    board.add_scalar(f"{stage.name}/{key}", value, epoch)
                board.flush()
                if is_best:
                    save_checkpoint(folder / BEST, tensors, header)
                tensors |= optimizer_tensors(stage.optimizers)
                save_checkpoint(folder / LAST, tensors, {**header, "best_score": best_score})
            if replan:
                epochs = replan(epoch, seconds)
                bar.total = epochs * stage.steps_per_epoch
    if folder is not None:
        best = load_checkpoint(folder / BEST)
    assert best is not None
    load_modules(stage.modules, best[0], folder or Path())
    return {**best[1], "seconds": seconds}


def _epoch(
    stage: Stage, epoch: int, seed: int, bar: Progress
) -> tuple[dict[str, float], float, Mapping[str, float]]:
    """Do an epoch; return the mean of what its steps show, its score, and what that shows."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    torch.manual_seed(seed * 100_003 + epoch)
    for module in stage.modules.values():
        module.train()
    stage.start_epoch(epoch, generator)
    sums: Counter[str] = Counter()
    for index in range(stage.steps_per_epoch):
        scalars = stage.step(epoch, index)
        sums.update(scalars)
        bar.update()
        if index % 10 == 0:
            bar.set_postfix({k: f"{v:.3g}" for k, v in scalars.items()}, refresh=False)
    for module in stage.modules.values():
        module.eval()
    return {key: value / stage.steps_per_epoch for key, value in sums.items()}, *stage.validate()


def _keep_others_out(folder: Path, held: ExitStack) -> None:
    """Lock a training's folder for as long as `held` is open; a killed process keeps no lock."""
    try:
        entry = os.open(folder, os.O_RDONLY)
        held.callback(os.close, entry)
        fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{folder}: another process trains here: wait for it, or end it"
        raise UserError(message) from error
    except OSError:
        pass  # there is no folder, or its file system has no locks


def _check_resumable(
    header: Mapping[str, Any], settings: Mapping[str, Any], path: Path, resume: int
) -> None:
    advice = "start over, or use another name or save directory"
    check_alike(path, header.get("settings", {}), settings, advice)
    if resume not in (LATEST, header["epoch"]):
        raise UserError(
            f"cannot resume epoch {resume}: the checkpoint in {path} is of epoch {header['epoch']}"
        )


def differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Name the keys in which two nested settings differ, with both values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            found
            for key in sorted(a.keys() | b.keys())
            for found in differing_keys(a.get(key), b.get(key), f"{prefix}{key}.")
        ]
    a, b = (list(v) if isinstance(v, tuple) else v for v in (a, b))
    return [] if a == b else [f"{prefix.rstrip('.')} {a!r} -> {b!r}"]


def check_alike(where: Path, before: Any, now: Any, advice: str) -> None:
    """Refuse what was made with other settings than those of now, and say what to do."""
    if changed := differing_keys(before, now):
        raise UserError(f"{where} was made with other settings ({', '.join(changed)}): {advice}")
