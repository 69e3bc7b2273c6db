"""Stage 1: the network f and its head g."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.common.config import Settings, parse_settings
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource, settings_split, spread_rows
from codedinvnet.models.checkpoint import (
    load_checkpoint,
    load_modules,
    module_tensors,
    save_checkpoint,
    tensors_digest,
)
from codedinvnet.models.coded import (
    CodedModel,
    Network,
    build_head,
    build_network,
    padded_shape,
    prepare,
)
from codedinvnet.nn.head import Head
from codedinvnet.nn.iresnet import IResNet, initialise_actnorm, mixup_points
from codedinvnet.nn.lipschitz import constrain_exactly, project
from codedinvnet.training.images import check_images, check_same_images
from codedinvnet.training.loop import (
    IMAGES,
    LAST,
    NETWORK_WEIGHTS,
    Stage,
    check_alike,
    differing_keys,
    make_optimizer,
    set_aside,
    starts_over,
    train_stage,
)
from codedinvnet.training.precision import autocast

NETWORK = "network.safetensors"
"""The trained f and g, in a network's folder."""
EVALUATION_BATCH = 250


def augment(x: Tensor, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (B, C, H, W), and shift each by up to `shift` pixels."""
    batch = x.shape[0]
    if flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
    if shift:
        height, width = x.shape[2:]
        offsets = torch.randint(0, 2 * shift + 1, (2, batch), generator=generator).to(x.device)
        rows = offsets[0][:, None] + torch.arange(height, device=x.device)
        columns = offsets[1][:, None] + torch.arange(width, device=x.device)
        x = F.pad(x, (shift,) * 4)
        index = torch.arange(batch, device=x.device)[:, None, None]
        x = x[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x


@torch.no_grad()
def embed_all(model: CodedModel, images: Tensor) -> Tensor:
    """Embed images (N, C, H, W) in batches, as (N, *latent_shape)."""
    return torch.cat([model.embed(part) for part in images.split(EVALUATION_BATCH)])


class NetworkStage(Stage):
    """Train f and g (Dinh & Lee, section 3.1: i-ResNet with manifold mixup)."""

    name = "network"

    def __init__(self, settings: Settings, source: ImageSource, device: torch.device) -> None:
        self.settings, self.source, self.device = settings, source, device
        self.options = settings.training
        torch.manual_seed(settings.seed)
        shape = padded_shape(source.shape, settings.data.padding)
        self.network = build_network(settings.network, shape).to(device)
        head = build_head(settings.network, self.network.latent_shape, len(source.classes))
        self.head = head.to(device)
        self.train_rows, self.validation_rows = settings_split(settings, source)
        if len(self.train_rows) < self.options.batch_size:
            raise UserError(
                f"training.batch_size {self.options.batch_size} is more than the "
                f"{len(self.train_rows)} training images"
            )
        optimizer = make_optimizer(
            (self.network, self.head), self.options.learning_rate, self.options.weight_decay
        )
        super().__init__(
            {"network": self.network, "head": self.head},
            {"optimizer": optimizer},
            rate=self.options.learning_rate,
            epochs=self.options.epochs,
            steps_per_epoch=len(self.train_rows) // self.options.batch_size,
            warmup=self.options.warmup,
        )
        self.points = mixup_points(self.network)
        self.order = self.train_rows

    def initialise(self) -> None:
        """Set the constraint and the activation normalisation before the first step."""
        rows = spread_rows(self.train_rows, self.options.init_batch)
        x = prepare(self.source.batch(rows)[0].to(self.device), self.settings.data.padding)
        project(self.network, iterations=50)
        initialise_actnorm(self.network, x)
        with torch.no_grad():
            self.head.norm.initialise(self.network(x))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the training images."""
        super().start_epoch(epoch, generator)
        if epoch == 0:
            self.initialise()
        self.order = self.train_rows[torch.randperm(len(self.train_rows), generator=generator)]

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        found = super().step(epoch, index)
        project(self.network)
        return found

    def batch_loss(self, index: int) -> Tensor:
        options = self.options
        rows = self.order[index * options.batch_size : (index + 1) * options.batch_size]
        images, labels = self.source.batch(rows)
        x = prepare(images.to(self.device), self.settings.data.padding)
        x = augment(x, options.flip, options.shift, self.generator)
        return self.mixup_loss(x, labels.to(self.device))

    def mixup_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with manifold mixup (Verma et al., ICML 2019) at a random layer."""
        options = self.options
        steps = self.network.steps()
        if options.mixup == "none":
            with autocast(self.options.precision, self.device):
                z = self.network(x)
            return F.cross_entropy(self.head(z.float()), labels)
        chosen = int(torch.randint(len(self.points), (), generator=self.generator))
        point = self.points[chosen]
        share = float(
            torch._sample_dirichlet(
                torch.full((2,), options.mixup_alpha, dtype=torch.float64), self.generator
            )[0]
        )
        partner = torch.randperm(x.shape[0], generator=self.generator).to(x.device)
        with autocast(self.options.precision, self.device):
            for position, transform in enumerate([*steps, nn.Identity()]):
                if position == point:
                    x = share * x + (1 - share) * x[partner]
                x = transform(x)
        logits = self.head(x.float())
        own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[partner])
        loss: Tensor = share * own + (1 - share) * other
        return loss

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by accuracy on the validation images."""
        correct, total = 0, len(self.validation_rows)
        for rows in self.validation_rows.split(EVALUATION_BATCH):
            images, labels = self.source.batch(rows)
            x = prepare(images.to(self.device), self.settings.data.padding)
            with torch.no_grad():
                logits = self.head(self.network(x))
                correct += int((logits.argmax(1).cpu() == labels).sum())
        return correct / total, {"validation_accuracy": correct / total}


def network_settings(settings: Settings) -> dict[str, Any]:
    """Return the part of the settings that a trained network depends on."""
    chosen = settings.model_dump(mode="json", include={"seed", "data", "network", "training"})
    return dict(chosen)


def train_network(
    settings: Settings, source: ImageSource, folder: Path, *, device: torch.device, resume: int = 0
) -> dict[str, Any]:
    """Train f and g, constrain f exactly, and leave `network.safetensors` in the folder.

    Its header names the weights as they were before the exact constraint, which rounds otherwise on
    another machine: a finished training that is resumed there leaves the same network. Until one
    that starts over has ended, there is no network.

    Returns:
        The header of the finished checkpoint.
    """
    if resume and (folder / LAST).is_file():  # in words, before the settings are compared
        _, last = load_checkpoint(folder / LAST)
        check_same_images(source, last.get("settings", {}).get(IMAGES) or "", "the network")
    stage = NetworkStage(settings, source, device)
    if starts_over(folder, resume):
        set_aside(folder, NETWORK)
    header = train_stage(
        stage,
        folder,
        epochs=settings.training.epochs,
        seed=settings.seed,
        settings={**network_settings(settings), IMAGES: source.digest()},
        resume=resume,
        keep={"classes": list(source.classes), "image_shape": list(source.shape)},
    )
    header[NETWORK_WEIGHTS] = tensors_digest(module_tensors(stage.modules))
    before = header["validation"]
    if isinstance(stage.network, IResNet):
        constrain_exactly(stage.network)
        _, after = stage.validate()
        header = {**header, "validation": dict(after)}
        Progress.write(
            f"network: constraint made exact, validation {before} -> {dict(after)}",
            file=sys.stderr,
        )
    save_checkpoint(folder / NETWORK, module_tensors(stage.modules), header)
    return header


def load_trained_network(
    settings: Settings, folder: Path, device: torch.device
) -> tuple[Network, Head, dict[str, Any]]:
    """Load what `train_network` left: f and g in evaluation mode, and the header."""
    path = folder / NETWORK
    if not path.is_file():
        raise UserError(
            f"no trained network at {path}: train it first (main.py, or `codedinvnet reproduce`)"
        )
    tensors, header = load_checkpoint(path)
    # The split, too: no validation image was trained on.
    wanted = settings.model_dump(mode="json", include={"seed", "data", "network"})
    made = {key: value for key, value in header["settings"].items() if key in wanted}
    check_alike(path, made, wanted, "train it again")
    shape = padded_shape(header["image_shape"], settings.data.padding)
    network = build_network(settings.network, shape)
    head = build_head(settings.network, network.latent_shape, len(header["classes"]))
    load_modules({"network": network, "head": head}, tensors, path)
    return network.to(device).eval(), head.to(device).eval(), header


def check_network_images(source: ImageSource, header: Mapping[str, Any]) -> None:
    """Make sure that images are those that a trained network was trained on."""
    shape, classes = tuple(header["image_shape"]), tuple(header["classes"])
    check_images(source, shape, classes, "the trained network")
    check_same_images(source, header["settings"].get(IMAGES) or "", "the network")


def as_trained(settings: Settings, folder: Path, header: Mapping[str, Any]) -> Settings:
    """Return settings with the training section of the network that is really there.

    What else is trained follows it, and so does a bundle's provenance. Warns if the settings' own
    section is another one.
    """
    raw = {**settings.model_dump(mode="json"), "training": header["settings"]["training"]}
    trained = parse_settings(raw, str(folder / NETWORK))
    changed = differing_keys(settings.training.model_dump(), trained.training.model_dump())
    if changed:
        warnings.warn(
            f"training: the settings of the network in {folder} are used ({', '.join(changed)})",
            stacklevel=2,
        )
    return trained
