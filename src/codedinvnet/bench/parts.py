"""What the trials of `bench accuracy` are made of: base models, trained parts, methods.

Trained parts lie below the benchmark's folder, one folder each, and are trained on the first use;
an interrupted training goes on from its newest checkpoint, one with other settings starts over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codedinvnet.bench.equal_cost import backup_width, plain_network, plain_width
from codedinvnet.bench.grid import Base, DataSetSettings, Trial, check_possible
from codedinvnet.bundle import Bundle, load_bundle, weights_digest
from codedinvnet.checkpoint import load_checkpoint, load_modules
from codedinvnet.classifier import ImageClassifier, classifier_of
from codedinvnet.config import PartSettings, PixelFusionSettings, Settings
from codedinvnet.data import ImageSource, random_groups, split_indices, spread_rows
from codedinvnet.errors import UserError
from codedinvnet.files import free_backup_name
from codedinvnet.methods import (
    NEEDS,
    RATIONAL,
    REGULARISED,
    AverageImage,
    CodedInvNet,
    CodedMethod,
    ConcatParM,
    LearnedCode,
    Need,
    Oracle,
    PaperInvNet,
    ParM,
    Replication,
    RobustApproxIFER,
    SmallBackup,
    Uncoded,
)
from codedinvnet.methods.nercc import tune
from codedinvnet.methods.systematic import Systematic
from codedinvnet.model import CodedModel, with_encoder
from codedinvnet.trained import (
    PART,
    WITH_PARTS,
    untrained_part,
    with_part,
)
from codedinvnet.training.check import check_same_images, check_settings
from codedinvnet.training.classifier import ClassifierStage, all_logits
from codedinvnet.training.fusion_data import (
    FusionData,
    draw_groups,
    invert_means,
)
from codedinvnet.training.loop import BEST, LAST, LATEST, Stage, changed_settings, train_stage
from codedinvnet.training.parity import LearnedCodeStage, ParityStage, Taught
from codedinvnet.training.pixels import VERSION, PixelStage

TUNING_IMAGES = 1000
"""Validation images on which NeRCC's regularisers are chosen."""


class PaperStage(PixelStage):
    """The paper's training of E, which leaves it as the other stages leave their parts."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Return E and the discriminator."""
        return {PART: self.model.encoder, "discriminator": self.discriminator}


def fusion_targets(model: CodedModel, source: ImageSource, groups: Tensor) -> FusionData:
    """Return groups, rows (N, k) of a source, with f⁻¹(mean z) of each, (N, C, H, W).

    Raises:
        UserError: if f cannot be inverted at a mean.
    """
    padding = model.settings.padding
    with tqdm(total=len(groups), desc="fusion data", unit="group", leave=False) as bar:
        targets, _ = invert_means(model.network, source, groups, padding=padding, bar=bar)
    return FusionData(groups, targets)


WITHOUT_CODE: Mapping[str, type[Systematic]] = {
    Uncoded.name: Uncoded,
    Replication.name: Replication,
}


class DataSet:
    """One image set with its base models and the parts trained for them.

    Args:
        name: of the image set.
        settings: from the grid.
        train: its training images; None leaves out what is trained or chosen on them.
        test: its test images.
        folder: where trained parts lie.
        device: what to compute on.
        limit: most training images, and a tenth of it validation images, that are used.

    Raises:
        UserError: if the bundle does not exist, does not take these images, or was trained on
            other ones.
    """

    def __init__(
        self,
        name: str,
        settings: DataSetSettings,
        train: ImageSource | None,
        test: ImageSource,
        folder: Path,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        self.name, self.settings, self.device = name, settings, device
        self._train, self.test, self.folder = train, test, folder / name
        self.bundles: dict[str, Bundle] = {}
        self.bundle = self.load(settings.bundle)
        self.train_rows = self.validation_rows = torch.arange(0)
        if train is not None:
            # The bundle's own split: no validation image was trained on.
            provenance = self.bundle.info.provenance
            served = provenance.settings
            check_same_images(train, provenance.images, f"bundle {settings.bundle!r}")
            self.train_rows, self.validation_rows = split_indices(
                len(train), served.data.validation, served.seed
            )
        if limit is not None:
            self.train_rows = spread_rows(self.train_rows, limit)
            self.validation_rows = spread_rows(self.validation_rows, max(1, limit // 10))
        self._majority: int | None = None
        self._parts: dict[Path, nn.Module] = {}
        self._logits: dict[tuple[Base, int, str], Tensor] = {}

    def load(self, name: str) -> Bundle:
        """Load a bundle, once.

        Raises:
            UserError: if there is none of that name, or it takes other images.
        """
        if name not in self.bundles:
            bundle = load_bundle(name, self.device)
            if bundle.info.input.shape != self.test.shape:
                raise UserError(
                    f"data set {self.name!r} has images of shape {self.test.shape}, "
                    f"but bundle {name!r} takes {bundle.info.input.shape}"
                )
            self.bundles[name] = bundle
        return self.bundles[name]

    @property
    def train(self) -> ImageSource:
        """The training images.

        Raises:
            UserError: if there are none.
        """
        if self._train is None:
            raise UserError(f"data set {self.name!r} has no training images here")
        return self._train

    def majority(self) -> int:
        """Return the most frequent class of the training images; without them, the first class."""
        if self._train is None:
            return 0
        if self._majority is None:
            labels = [self.train.batch(rows)[1] for rows in self.train_rows.split(5000)]
            self._majority = int(torch.cat(labels).bincount().argmax())
        return self._majority

    # Base models

    def classifier(self, base: Base, seed: int) -> ImageClassifier:
        """Return a base model; the plain one is trained on the first use."""
        if base == "invertible":
            return classifier_of(self.bundle.model)
        return cast(ImageClassifier, self._resnet(seed))

    @cached_property
    def resnet_width(self) -> int:
        """Width of the plain base model."""
        return plain_width(self.bundle.model)

    def _resnet(self, seed: int) -> nn.Module:
        """Return the plain base model, of about the served one's cost."""
        part = self.settings.classifier
        depends = self._images("resnet")

        def make() -> nn.Module:
            padding = self.bundle.model.settings.padding
            return ImageClassifier(plain_network(self.bundle.model, self.resnet_width), padding)

        def stage(module: nn.Module) -> Stage:
            return self._classifier_stage(module, part)

        return self._trained(self.folder / "resnet", seed, part, make, stage, depends)

    # Trained parts

    def _classifier_stage(
        self, module: nn.Module, part: PartSettings, teacher: Tensor | None = None
    ) -> Stage:
        """Return the training of a classifier, its images and precision as the bundle's were."""
        options = self.bundle.info.provenance.settings.training
        return ClassifierStage(
            module,
            self.train,
            self.train_rows,
            self.validation_rows,
            part,
            flip=options.flip,
            shift=options.shift,
            precision=options.precision,
            teacher=teacher,
        )

    def _images(self, base: Base) -> dict[str, Any]:
        """Return which images a part is trained on, and for which base model."""
        return {"images": len(self.train_rows), **self._base(base, self.settings.bundle)}

    def _base(self, base: Base, bundle: str) -> dict[str, Any]:
        """Return what a base model depends on, beside its own training.

        The plain one has the cost, the split and the augmentation of the bundle's, not its weights:
        another bundle of the same network leaves it, and what is trained for it, as they are.
        """
        if base == "invertible":
            return {"bundle": weights_digest(bundle)}
        served = self.bundle.info.provenance.settings
        made = {
            "width": self.resnet_width,
            "padding": self.bundle.model.settings.padding,
            "validation": served.data.validation,
            "split_seed": served.seed,
            **{key: getattr(served.training, key) for key in ("flip", "shift", "precision")},
        }
        return {"plain": made}

    def _trained(
        self,
        folder: Path,
        seed: int,
        part: PartSettings | PixelFusionSettings,
        make: Callable[[], nn.Module],
        stage: Callable[[nn.Module], Stage],
        depends: dict[str, Any],
    ) -> nn.Module:
        """Return a part; train it, or what is left of its training, if it is not finished.

        What was trained with other settings is trained anew, and the old training set aside.
        """
        folder = folder / f"seed{seed}"
        if folder not in self._parts:
            torch.manual_seed(seed)
            module = make().to(self.device)
            settings = {"part": part.model_dump(mode="json"), "seed": seed, **depends}
            _set_aside(folder, settings)
            if not _load_finished(module, folder, part.epochs):
                train_stage(
                    stage(module),
                    folder,
                    epochs=part.epochs,
                    seed=seed,
                    settings=settings,
                    resume=LATEST,
                )
            self._parts[folder] = module.eval().requires_grad_(False)
        return self._parts[folder]

    def logits(self, base: Base, seed: int, split: str) -> Tensor:
        """Return a base model's logits (N, classes) of the train, validation or test images."""
        key = (base, seed if base == "resnet" else 0, split)
        if key not in self._logits:
            source = self.test if split == "test" else self.train
            rows = {
                "train": self.train_rows,
                "validation": self.validation_rows,
                "test": torch.arange(len(self.test)),
            }[split]
            self._logits[key] = all_logits(
                self.classifier(base, seed),
                source,
                rows,
                description=f"{self.name}, {base}: {split} logits",
            )
        return self._logits[key]

    def _taught(self, base: Base, seed: int) -> tuple[Taught, Taught]:
        return (
            Taught(self.train, self.train_rows, self.logits(base, seed, "train")),
            Taught(self.train, self.validation_rows, self.logits(base, seed, "validation")),
        )

    @property
    def paper(self) -> PixelFusionSettings:
        """How the encoder of coded-invnet-paper is trained; load_grid has seen that it is there."""
        assert self.settings.paper is not None
        return self.settings.paper

    def paper_settings(self, k: int) -> Settings:
        """Return the bundle's settings with the training of coded-invnet-paper in them.

        Raises:
            UserError: if f, E, the images and groups of k do not fit each other.
        """
        served = self.bundle.info.provenance.settings
        settings = served.model_copy(update={"fusion": self.paper})
        check_settings(settings, self.train, k)
        return settings

    def _paper_encoder(self, trial: Trial) -> nn.Module:
        """Return an E that was trained as in the paper, around the bundle's f and g."""
        settings, paper, k = self.paper_settings(trial.k), self.paper, trial.k
        depends = {
            "method": trial.method,
            "base": trial.base,
            "k": k,
            "encoder": paper.encoder.model_dump(mode="json"),
            "training": VERSION,
            **self._images(trial.base),
        }

        def make() -> nn.Module:
            classifier = self.classifier(trial.base, trial.seed)
            return untrained_part(trial.method, classifier, self.bundle.model, k, depends)

        def stage(encoder: nn.Module) -> Stage:
            model = with_encoder(self.bundle.model, encoder)
            generator = torch.Generator().manual_seed(trial.seed)
            groups = draw_groups(self.train_rows, paper.groups, k, generator)
            data = fusion_targets(model, self.train, groups)
            seed = trial.seed
            return PaperStage(settings, paper, self.train, model, data, k, self.device, seed)

        folder = self._part_folder(trial)
        return self._trained(folder, trial.seed, paper, make, stage, depends)

    def part(self, trial: Trial) -> nn.Module:
        """Return the part that a trial's method needs beside its base model."""
        if trial.method == PaperInvNet.name:
            return self._paper_encoder(trial)
        name, base, seed, k = trial.method, trial.base, trial.seed, trial.k
        classifier = self.classifier(base, seed)
        depends = {"method": name, "base": base, "k": k, **self._images(base)}
        if base == "resnet":
            depends["classifier"] = self.settings.classifier.model_dump(mode="json")
        if name == SmallBackup.name:
            depends["width"] = backup_width(self.bundle.model, k)
        settings = self.settings.backup if name == SmallBackup.name else self.settings.parity

        def make() -> nn.Module:
            return untrained_part(name, classifier, self.bundle.model, k, depends)

        def stage(module: nn.Module) -> Stage:
            train, validation = self._taught(base, seed)
            if name == SmallBackup.name:
                return self._classifier_stage(module, settings, train.logits)
            if name == LearnedCode.name:
                coder = cast(nn.ModuleDict, module)
                return LearnedCodeStage(coder, classifier, train, validation, k, settings)
            encode = ConcatParM.encode if name == ConcatParM.name else ParM.encode
            return ParityStage(module, encode, train, validation, k, settings)

        return self._trained(self._part_folder(trial), seed, settings, make, stage, depends)

    def _part_folder(self, trial: Trial) -> Path:
        return self.folder / f"{trial.method}-of-{trial.base}-k{trial.k}"

    def training_seconds(self, trial: Trial) -> float | None:
        """Return what training a trial's part took, or else its plain base model; None without."""
        folder = self._part_folder(trial)
        if trial.method not in WITH_PARTS:
            if trial.base != "resnet":
                return None
            folder = self.folder / "resnet"
        seconds: float = load_checkpoint(folder / f"seed{trial.seed}" / LAST)[1]["seconds"]
        return seconds

    def part_file(self, trial: Trial) -> Path:
        """Return the checkpoint of a trial's part for `serve --part`; train it if need be."""
        self.part(trial)
        return self._part_folder(trial) / f"seed{trial.seed}" / BEST

    def validation_groups(self, k: int) -> tuple[Tensor, Tensor]:
        """Return groups (G, k, C, H, W) of validation images and their labels (G, k)."""
        rows = spread_rows(self.validation_rows, TUNING_IMAGES)
        members = random_groups(len(rows), k, torch.Generator().manual_seed(k)).members
        queries, labels = self.train.batch(rows[members.flatten()])
        return queries.unflatten(0, tuple(members.shape)), labels.view_as(members)

    # Methods

    def check(self, trial: Trial) -> None:
        """Refuse a trial that cannot be done.

        Raises:
            UserError: one line.
        """
        sizes = self.load(trial.bundle).info.group_sizes
        check_possible(trial, self.test.shape, len(self.test), sizes)
        if trial.method == PaperInvNet.name:
            self.paper_settings(trial.k)

    def method(self, trial: Trial) -> CodedMethod:
        """Return a trial's method with everything it needs, trained if it was not."""
        k, stragglers = trial.k, max(1, trial.missing)
        if trial.method == CodedInvNet.name:
            return self.load(trial.bundle).method(k)
        if trial.method in (Oracle.name, AverageImage.name):
            return self.load(trial.bundle).coded(trial.method, k)
        classifier = self.classifier(trial.base, trial.seed)
        if trial.method in WITH_PARTS:
            return with_part(trial.method, classifier, self.bundle.model, self.part(trial), k)
        if trial.method in REGULARISED:
            groups, labels = self.validation_groups(k)
            return tune(
                REGULARISED[trial.method], classifier, groups, labels, stragglers=stragglers
            )
        if trial.method in RATIONAL:
            return RATIONAL[trial.method](classifier, k, stragglers=stragglers)
        if trial.method == RobustApproxIFER.name:
            errors = max(1, trial.corrupt)
            return RobustApproxIFER(classifier, k, stragglers=stragglers, errors=errors)
        return WITHOUT_CODE[trial.method](classifier, k)

    def depends(self, trial: Trial) -> dict[str, Any]:
        """Return what a trial's result depends on beside the grid: its key in the results."""
        need, part = NEEDS[trial.method], self.settings
        found: dict[str, Any] = {
            **self._base(trial.base, trial.bundle),
            "test_images": len(self.test),
            "train_images": len(self.train_rows),
        }
        if trial.method == CodedInvNet.name and trial.missing > 1 and self.method(trial).guesses:
            found["guesses"] = True  # rows of before had no answer there
        if trial.base == "resnet":
            found["classifier"] = part.classifier.model_dump(mode="json")
        if need is Need.BACKUP:
            found["backup"] = part.backup.model_dump(mode="json")
        if need in (Need.PARITY_MODEL, Need.LEARNED_CODE):
            found["parity"] = part.parity.model_dump(mode="json")
        if need is Need.ENCODER:
            found["paper"] = self.paper.model_dump(mode="json")
            found["paper_training"] = VERSION
        return found


def _set_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Rename the folder of a training with other settings: it is neither finished nor resumed."""
    for path in (folder / LAST, folder / BEST):
        if not path.is_file():
            continue
        before = load_checkpoint(path)[1].get("settings", {})
        different = changed_settings(before, settings)
        if different:
            kept = free_backup_name(folder)
            folder.rename(kept)
            told = (
                f"{folder}: trained anew, with {', '.join(different)}; the old one is {kept.name}"
            )
            tqdm.write(told, file=sys.stderr)
            return


def _load_finished(module: nn.Module, folder: Path, epochs: int) -> bool:
    """Fill a module from its finished training; return whether there is one."""
    last, best = folder / LAST, folder / BEST
    if not (last.is_file() and best.is_file()):
        return False
    _, header = load_checkpoint(last)
    if header["epoch"] < epochs:
        return False
    tensors, _ = load_checkpoint(best)
    load_modules({PART: module}, tensors, best)
    return True
