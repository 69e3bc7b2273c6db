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

from codedinvnet.common.config import Settings, TrainSettings, parse_settings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource, split_images, spread_rows
from codedinvnet.models.checkpoint import (
    load_checkpoint,
    load_modules,
    module_tensors,
    save_checkpoint,
    tensors_digest,
)
from codedinvnet.models.coded import CodedModel, build_model, model_settings
from codedinvnet.nn.head import Head
from codedinvnet.nn.iresnet import IResNet, initialise_actnorm, mixup_points, steps
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

    def __init__(
        self, model: CodedModel, options: TrainSettings, train: ImageSource, validation: ImageSource
    ) -> None:
        self.model, self.options, self.train, self.validation = model, options, train, validation
        self.device = first_tensor(model).device
        if len(train) < options.batch_size:
            raise UserError(
                f"training.batch_size {options.batch_size} is more than the {len(train)} "
                "training images"
            )
        modules = {"network": model.network, "head": model.head}
        optimizer = make_optimizer(modules.values(), options.learning_rate, options.weight_decay)
        super().__init__(
            modules,
            {"optimizer": optimizer},
            rate=options.learning_rate,
            epochs=options.epochs,
            steps_per_epoch=len(train) // options.batch_size,
            warmup=options.warmup,
        )
        self.points = mixup_points(model.network)
        self.order = torch.arange(len(train))

    def initialise(self) -> None:
        """Set the constraint and the activation normalisation before the first step."""
        rows = spread_rows(torch.arange(len(self.train)), self.options.init_batch)
        x = self.model.prepare(self.train.batch(rows)[0].to(self.device))
        project(self.model.network, iterations=50)
        initialise_actnorm(self.model.network, x)
        if isinstance(self.model.head, Head):
            with torch.no_grad():
                self.model.head.norm.initialise(self.model.network(x))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the training images."""
        super().start_epoch(epoch, generator)
        if epoch == 0:
            self.initialise()
        self.order = torch.randperm(len(self.train), generator=generator)

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        found = super().step(epoch, index)
        project(self.model.network)
        return found

    def batch_loss(self, index: int) -> Tensor:
        options = self.options
        rows = self.order[index * options.batch_size : (index + 1) * options.batch_size]
        images, labels = self.train.batch(rows)
        x = self.model.prepare(images.to(self.device))
        x = augment(x, options.flip, options.shift, self.generator)
        return self.mixup_loss(x, labels.to(self.device))

    def mixup_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with manifold mixup (Verma et al., ICML 2019) at a random layer."""
        options = self.options
        if options.mixup == "none":
            with autocast(self.options.precision, self.device):
                z = self.model.network(x)
            return F.cross_entropy(self.model.head(z.float()), labels)
        chosen = int(torch.randint(len(self.points), (), generator=self.generator))
        point = self.points[chosen]
        share = float(
            torch._sample_dirichlet(
                torch.full((2,), options.mixup_alpha, dtype=torch.float64), self.generator
            )[0]
        )
        partner = torch.randperm(x.shape[0], generator=self.generator).to(x.device)
        with autocast(self.options.precision, self.device):
            for position, transform in enumerate([*steps(self.model.network), nn.Identity()]):
                if position == point:
                    x = share * x + (1 - share) * x[partner]
                x = transform(x)
        logits = self.model.head(x.float())
        own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[partner])
        loss: Tensor = share * own + (1 - share) * other
        return loss

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by accuracy on the validation images."""
        correct, total = 0, len(self.validation)
        for rows in torch.arange(total).split(EVALUATION_BATCH):
            images, labels = self.validation.batch(rows)
            with torch.no_grad():
                logits = self.model.classify(self.model.embed(images.to(self.device)))
                correct += int((logits.argmax(1).cpu() == labels).sum())
        return correct / total, {"validation_accuracy": correct / total}


def fit_network(stage: NetworkStage, folder: Path | None = None, **how: Any) -> dict[str, Any]:
    """Train f and g by `train_stage`, and constrain f exactly.

    Returns:
        The header of the best checkpoint, with its NETWORK_WEIGHTS: the digest of the weights as
        they were before the exact constraint, which rounds otherwise on another machine.
    """
    header = train_stage(stage, folder, epochs=stage.options.epochs, **how)
    header[NETWORK_WEIGHTS] = tensors_digest(module_tensors(stage.modules))
    if isinstance(stage.model.network, IResNet):
        before = header["validation"]
        constrain_exactly(stage.model.network)
        after = dict(stage.validate()[1])
        header = {**header, "validation": after}
        told = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in after)
        Progress.write(f"network: constraint made exact, {told}", file=sys.stderr)
    return header


def network_settings(settings: Settings) -> dict[str, Any]:
    """Return the part of the settings that a trained network depends on."""
    chosen = settings.model_dump(mode="json", include={"seed", "data", "network", "training"})
    return dict(chosen)


def train_network(
    settings: Settings, source: ImageSource, folder: Path, *, device: torch.device, resume: int = 0
) -> dict[str, Any]:
    """Train f and g, and leave `network.safetensors` in the folder.

    A finished training that is resumed on another machine leaves the same NETWORK_WEIGHTS in its
    header. Until one that starts over has ended, there is no network.

    Returns:
        The header of the finished checkpoint.
    """
    if resume and (folder / LAST).is_file():  # in words, before the settings are compared
        _, last = load_checkpoint(folder / LAST)
        check_same_images(source, last["settings"][IMAGES], "the network")
    model = fresh_model(settings, source.shape, source.classes).to(device)
    stage = NetworkStage(model, settings.training, *split_images(settings, source))
    if starts_over(folder, resume):
        set_aside(folder, NETWORK)
    header = fit_network(
        stage,
        folder,
        seed=settings.seed,
        settings={**network_settings(settings), IMAGES: source.digest()},
        resume=resume,
        keep={"classes": list(source.classes), "image_shape": list(source.shape)},
    )
    save_checkpoint(folder / NETWORK, module_tensors(stage.modules), header)
    return header


def fresh_model(
    settings: Settings, image_shape: tuple[int, int, int], classes: tuple[str, ...]
) -> CodedModel:
    """Build an untrained model, its weights drawn by the settings' seed."""
    torch.manual_seed(settings.seed)
    return build_model(model_settings(settings, image_shape, classes))


def load_trained_network(
    settings: Settings, folder: Path, device: torch.device
) -> tuple[CodedModel, dict[str, Any]]:
    """Load what `train_network` left: f and g of a model in evaluation mode, and the header."""
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
    model = fresh_model(settings, tuple(header["image_shape"]), tuple(header["classes"]))
    load_modules({"network": model.network, "head": model.head}, tensors, path)
    return model.to(device).eval(), header


def check_network_images(source: ImageSource, header: Mapping[str, Any]) -> None:
    """Make sure that images are those that a trained network was trained on."""
    shape, classes = tuple(header["image_shape"]), tuple(header["classes"])
    check_images(source, shape, classes, "the trained network")
    check_same_images(source, header["settings"][IMAGES], "the network")


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
