"""What the trials of `bench accuracy` are made of: base models, trained parts, methods.

Trained parts lie below the benchmark's folder, one folder each, and are trained on the first use;
an interrupted training goes on from its newest checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from codedinvnet.bench.grid import Base, DataSetSettings, Trial
from codedinvnet.bundle import WEIGHTS, Bundle, bundle_folder, load_bundle
from codedinvnet.checkpoint import load_checkpoint, load_modules
from codedinvnet.classifier import ImageClassifier, classifier_of
from codedinvnet.config import PartSettings
from codedinvnet.data import ImageSource, random_groups, split_indices
from codedinvnet.errors import UserError
from codedinvnet.methods import (
    NEEDS,
    ApproxIFER,
    CodedInvNet,
    CodedMethod,
    ConcatParM,
    LearnedCode,
    Need,
    NeRCC,
    Oracle,
    ParM,
    Replication,
    RobustApproxIFER,
    SmallBackup,
    Uncoded,
)
from codedinvnet.methods.nercc import tune
from codedinvnet.methods.parm import ConvEncoder, LinearDecoder, ParityModel
from codedinvnet.nn.resnet import ResNet, width_of_cost
from codedinvnet.report import count_macs
from codedinvnet.training.classifier import ClassifierStage, all_logits
from codedinvnet.training.loop import LATEST, Stage, differing_keys, train_stage
from codedinvnet.training.parity import LearnedCodeStage, ParityStage, Taught

TUNING_IMAGES = 1000
"""Validation images on which NeRCC's regularisers are chosen."""
BACKUP_BLOCKS, BACKUP_SQUEEZE = (1, 1, 1), 2
"""Shape of the small backup: at its cost, a shallow network at half size beats a thin deep one."""


class DataSet:
    """One image set with its base models and the parts trained for them.

    Args:
        name: of the image set.
        settings: from the grid.
        train: its training images.
        test: its test images.
        folder: where trained parts lie.
        device: what to compute on.

    Raises:
        UserError: if the bundle does not exist or does not take these images.
    """

    def __init__(
        self,
        name: str,
        settings: DataSetSettings,
        train: ImageSource,
        test: ImageSource,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.name, self.settings, self.device = name, settings, device
        self.train, self.test, self.folder = train, test, folder / name
        self.bundles: dict[str, Bundle] = {}
        self.bundle = self.load(settings.bundle)
        data = self.bundle.info.provenance.settings.data
        self.train_rows, self.validation_rows = split_indices(
            len(train), data.validation, self.bundle.info.provenance.settings.seed
        )
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

    def majority(self) -> int:
        """Return the most frequent class of the training images."""
        if self._majority is None:
            labels = [self.train.batch(rows)[1] for rows in self.train_rows.split(5000)]
            self._majority = int(torch.cat(labels).bincount().argmax())
        return self._majority

    # Base models

    def classifier(self, base: Base, seed: int) -> ImageClassifier:
        """Return a base model; the plain one is trained on the first use."""
        if base == "invertible":
            return classifier_of(self.bundle.model)
        return cast(ImageClassifier, self._plain("classifier", base, seed, 1, None))

    def _macs(self, network: nn.Module) -> int:
        return count_macs(lambda: network(torch.rand(1, *self.bundle.model.input_shape)))

    def served_macs(self) -> int:
        """Return the multiply-adds of g(f(x)) for one image."""
        model = copy.deepcopy(self.bundle.model).to("cpu")
        return self._macs(nn.Sequential(model.network, model.head))

    def _plain(
        self, kind: str, base: Base, seed: int, share: int, teacher: ImageClassifier | None
    ) -> nn.Module:
        """Return a plain classifier of 1/share the served one's cost, trained if it was not."""
        small = kind == "backup"
        channels = self.bundle.model.input_shape[0]
        classes = len(self.test.classes)
        shape: dict[str, Any] = (
            {"blocks": BACKUP_BLOCKS, "squeeze": BACKUP_SQUEEZE} if small else {}
        )

        def network(width: int) -> ResNet:
            return ResNet(channels, classes, width=width, **shape)

        budget = self.served_macs() // share
        width = width_of_cost(lambda w: self._macs(network(w).eval()), budget)
        info = self.bundle.info.provenance.settings
        part = self.settings.backup if small else self.settings.classifier

        def make() -> tuple[nn.Module, Callable[[], Stage]]:
            padding = self.bundle.model.settings.padding
            classifier = ImageClassifier(network(width), padding).to(self.device)

            def stage() -> Stage:
                return ClassifierStage(
                    classifier,
                    self.train,
                    self.train_rows,
                    self.validation_rows,
                    part,
                    flip=info.training.flip,
                    shift=info.training.shift,
                    teacher=None if teacher is None else self.logits(base, seed, "train"),
                )

            return classifier, stage

        folder = self.folder / (f"backup-of-{base}-k{share}" if small else "resnet")
        return self._trained(folder, seed, part, make, {"width": width, **self._teacher(base)})

    # Trained parts

    def _teacher(self, base: Base) -> dict[str, Any]:
        """Return what a part trained for a base model depends on, beside its own settings."""
        found: dict[str, Any] = {
            "images": len(self.train_rows),
            "bundle": self.fingerprint(self.settings.bundle),
        }
        if base == "resnet":
            found["classifier"] = self.settings.classifier.model_dump(mode="json")
        return found

    def fingerprint(self, bundle: str) -> str:
        """Return a short digest of a bundle's weights."""
        content = (bundle_folder(bundle) / WEIGHTS).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def _trained(
        self,
        folder: Path,
        seed: int,
        part: PartSettings,
        make: Callable[[], tuple[nn.Module, Callable[[], Stage]]],
        depends: dict[str, Any],
    ) -> nn.Module:
        """Return a part; train it, or what is left of its training, if it is not finished."""
        folder = folder / f"seed{seed}"
        if folder not in self._parts:
            torch.manual_seed(seed)
            module, stage = make()
            settings = {"part": part.model_dump(mode="json"), "seed": seed, **depends}
            if not _load_finished(module, folder, settings, part.epochs):
                train_stage(
                    stage(),
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

    def parity_model(self, trial: Trial) -> ParityModel:
        """Return ParM's parity model; it begins as a copy of the base model."""
        base, seed, k, part = trial.base, trial.seed, trial.k, self.settings.parity
        kind = ConcatParM if trial.method == ConcatParM.name else ParM

        def make() -> tuple[nn.Module, Callable[[], Stage]]:
            own = copy.deepcopy(self.classifier(base, seed)).requires_grad_(True)
            model = ParityModel(own, k)
            return model, lambda: ParityStage(
                model, kind.encode, *self._taught(base, seed), k, part
            )

        folder = self.folder / f"{kind.name}-of-{base}-k{k}"
        return cast(ParityModel, self._trained(folder, seed, part, make, self._teacher(base)))

    def learned_code(self, trial: Trial) -> nn.ModuleDict:
        """Return the learned encoder and decoder."""
        base, seed, k, part = trial.base, trial.seed, trial.k, self.settings.parity
        classifier = self.classifier(base, seed)

        def make() -> tuple[nn.Module, Callable[[], Stage]]:
            coder = nn.ModuleDict(
                {"encoder": ConvEncoder(k), "decoder": LinearDecoder(k, len(self.test.classes))}
            ).to(self.device)
            return coder, lambda: LearnedCodeStage(
                coder, classifier, *self._taught(base, seed), k, part
            )

        folder = self.folder / f"{LearnedCode.name}-of-{base}-k{k}"
        return cast(nn.ModuleDict, self._trained(folder, seed, part, make, self._teacher(base)))

    def validation_groups(self, k: int, images: int = TUNING_IMAGES) -> tuple[Tensor, Tensor]:
        """Return groups (G, k, C, H, W) of validation images and their labels (G, k)."""
        rows = self.validation_rows[:images]
        members = random_groups(len(rows), k, torch.Generator().manual_seed(k)).members
        queries, labels = self.train.batch(rows[members.flatten()])
        return queries.unflatten(0, tuple(members.shape)), labels.view_as(members)

    # Methods

    def method(self, trial: Trial) -> CodedMethod:
        """Return a trial's method with everything it needs, trained if it was not."""
        k, stragglers = trial.k, max(1, trial.missing)
        if trial.method == CodedInvNet.name:
            return self.load(trial.bundle).method(k)
        if trial.method == Oracle.name:
            return Oracle(self.load(trial.bundle).model, k)
        classifier = self.classifier(trial.base, trial.seed)
        if trial.method in (ParM.name, ConcatParM.name):
            kind = ConcatParM if trial.method == ConcatParM.name else ParM
            return kind(classifier, self.parity_model(trial), k)
        if trial.method == LearnedCode.name:
            coder = self.learned_code(trial)
            return LearnedCode(classifier, coder["encoder"], coder["decoder"], k)
        if trial.method == SmallBackup.name:
            backup = self._plain("backup", trial.base, trial.seed, k, classifier)
            return SmallBackup(classifier, backup, k)
        if trial.method == NeRCC.name:
            groups, labels = self.validation_groups(k)
            return tune(classifier, groups, labels, stragglers=stragglers)
        if trial.method == ApproxIFER.name:
            return ApproxIFER(classifier, k, stragglers=stragglers)
        if trial.method == RobustApproxIFER.name:
            return RobustApproxIFER(classifier, k, stragglers=stragglers)
        return (
            Uncoded(classifier, k) if trial.method == Uncoded.name else Replication(classifier, k)
        )

    def depends(self, trial: Trial) -> dict[str, Any]:
        """Return what a trial's result depends on beside the grid: its key in the results."""
        need, part = NEEDS[trial.method], self.settings
        found: dict[str, Any] = {
            "bundle": self.fingerprint(trial.bundle),
            "test_images": len(self.test),
            "train_images": len(self.train_rows),
        }
        if trial.base == "resnet":
            found["classifier"] = part.classifier.model_dump(mode="json")
        if need is Need.BACKUP:
            found["backup"] = part.backup.model_dump(mode="json")
        if need in (Need.PARITY_MODEL, Need.LEARNED_CODE):
            found["parity"] = part.parity.model_dump(mode="json")
        return found


def _load_finished(module: nn.Module, folder: Path, settings: dict[str, Any], epochs: int) -> bool:
    """Fill a module from its finished training; return whether there is one with these settings."""
    last, best = folder / "last.safetensors", folder / "best.safetensors"
    if not (last.is_file() and best.is_file()):
        return False
    _, header = load_checkpoint(last)
    if header["epoch"] < epochs or differing_keys(header["settings"], settings):
        return False
    tensors, _ = load_checkpoint(best)
    load_modules({"part": module}, tensors, best)
    return True
