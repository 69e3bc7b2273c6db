"""What the trials of `bench accuracy` are made of: base models, trained parts, methods.

Trained parts lie below the benchmark's folder, one folder each, and are trained on the first use;
an interrupted training goes on from its newest checkpoint, one with other settings starts over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.equal_cost import macs, plain_network, plain_width
from codedinvnet.codes.method import Given
from codedinvnet.codes.registry import find_method
from codedinvnet.common.config import PartSettings, PixelFusionSettings, Section
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageRows, ImageSource, random_groups, spread_rows
from codedinvnet.evaluation.trials import Base, DataSetSettings, Trial, check_possible
from codedinvnet.models.bundle import load_bundle, weights_digest
from codedinvnet.models.checkpoint import PART, load_checkpoint, load_modules
from codedinvnet.models.network import ImageNetwork, classifier_of
from codedinvnet.training.images import bundle_split, check_images, check_settings
from codedinvnet.training.loop import BEST, LAST, differing_keys
from codedinvnet.training.part import TrainingData, all_logits, train_classifier, train_part

Scored = Literal["test", "validation"]
TUNING_IMAGES = 1000
"""Validation images on which a method is tuned."""


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
        split: what methods are scored on: the test images, or the validation images in their place.

    Raises:
        UserError: if the bundle does not exist, does not take these images or classes, or was
            trained on other images; or if there are no training images to take validation images
            from.
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
        split: Scored = "test",
    ) -> None:
        self.name, self.settings, self.device, self.split = name, settings, device, split
        self._train, self.test, self.folder = train, test, folder / name
        self.bundle = load_bundle(settings.bundle, device)
        info, whose = self.bundle.info, f"bundle {settings.bundle!r}"
        for source in (test, train):
            if source is not None:
                check_images(source, info.input.shape, info.classes, whose)
        self.train_rows = self.validation_rows = torch.arange(0)
        if train is not None:
            # The bundle's own split: no validation image was trained on.
            self.train_rows, self.validation_rows = bundle_split(self.bundle, train, whose)
        if limit is not None:
            self.train_rows = spread_rows(self.train_rows, limit)
            self.validation_rows = spread_rows(self.validation_rows, max(1, limit // 10))
        if split == "validation":
            self.test = ImageRows(self.train, self.validation_rows, "the validation images")
        self.invertible = classifier_of(self.bundle.model)
        self._parts: dict[tuple[Path, str], nn.Module] = {}
        self._logits: dict[tuple[nn.Module, str], Tensor] = {}

    @property
    def train(self) -> ImageSource:
        """The training images."""
        if self._train is None:
            raise UserError(f"data set {self.name!r} has no training images here")
        return self._train

    @cached_property
    def _digests(self) -> tuple[str, str]:
        """What tells the training images, "" without any, and those that are scored from others."""
        return self._train.digest() if self._train is not None else "", self.test.digest()

    @cached_property
    def majority(self) -> int:
        """The most frequent class of the training images; without them, the first class."""
        if self._train is None:
            return 0
        return int(self.train.labels[self.train_rows].bincount().argmax())

    # Base models

    def classifier(self, base: Base, seed: int) -> ImageNetwork:
        """Return a base model, always the same module.

        The plain one, of about the served one's cost, is trained by the seed on the first use.
        """
        if base == "invertible":
            return self.invertible

        def make() -> nn.Module:
            network = plain_network(self.bundle.model, plain_width(self.bundle.model))
            return ImageNetwork(network, self.test.shape, self.bundle.model.padding)

        def fit(data: TrainingData) -> nn.Module:
            torch.manual_seed(seed)
            return train_classifier(make().to(self.device), data, self._plain)

        depends, folder = self._images("resnet"), self.folder / "resnet"
        found = self._trained(folder, seed, "resnet", self._plain, make, fit, depends)
        return cast(ImageNetwork, found)

    @property
    def _plain(self) -> PartSettings:
        """How the plain base model is trained."""
        assert self.settings.classifier is not None  # `check_part` refused the trial
        return self.settings.classifier

    def served_macs(self, trial: Trial) -> int:
        """Return the multiply-adds of a query that a trial's base model answers directly."""
        return macs(self.classifier(trial.base, trial.seed).network, self.bundle.model)

    def logits(self, base: Base, seed: int, split: str) -> Tensor:
        """Return a base model's logits (N, classes) of the train, validation or test images."""
        classifier = self.classifier(base, seed)
        key = (classifier, split)
        if key not in self._logits:
            source = self.test
            if split != "test":
                rows = self.train_rows if split == "train" else self.validation_rows
                source = ImageRows(self.train, rows, f"the {split} images")
            told = f"{self.name}, {base}: {split} logits"
            self._logits[key] = all_logits(classifier, source, description=told)
        return self._logits[key]

    # Trained parts

    def _base(self, base: Base) -> dict[str, Any]:
        """Return what a base model depends on, apart from its own training.

        The plain one has the cost, the split and the augmentation of the bundle's, not its weights:
        another bundle of the same network leaves it, and what is trained for it, as they are.
        """
        if base == "invertible":
            return {"bundle": weights_digest(self.settings.bundle)}
        served = self.bundle.info.provenance.settings
        made = {
            "width": plain_width(self.bundle.model),
            "padding": self.bundle.model.padding,
            "validation": served.data.validation,
            "split_seed": served.seed,
            **{key: getattr(served.training, key) for key in ("flip", "shift", "precision")},
        }
        return {"plain": made}

    def _images(self, base: Base) -> dict[str, Any]:
        """Return which images a part is trained on, and for which base model."""
        own = {"images": len(self.train_rows), "train_digest": self._digests[0]}
        return {**own, **self._base(base)}

    def _trained(
        self,
        folder: Path,
        seed: int,
        base: Base,
        budget: Section,
        make: Callable[[], nn.Module],
        fit: Callable[[TrainingData], nn.Module],
        depends: dict[str, Any],
    ) -> nn.Module:
        """Return a part that `make` makes and `fit` trains, unless its folder has it finished.

        What was trained with another budget, or `depends` on something else, is trained again.
        """
        folder = folder / f"seed{seed}"
        settings = {"part": budget.model_dump(mode="json"), "seed": seed, **depends}
        known = (folder, json.dumps(settings, sort_keys=True))
        if known not in self._parts:
            if _is_finished(folder, getattr(budget, "epochs", 1), settings):
                module = make().to(self.device)
                load_modules({PART: module}, load_checkpoint(folder / BEST)[0], folder / BEST)
            else:
                data = TrainingData(
                    ImageRows(self.train, self.train_rows, "the training images"),
                    ImageRows(self.train, self.validation_rows, "the validation images"),
                    partial(self.logits, base, seed),
                    self.bundle.info.provenance.settings.training,
                    seed,
                    self.device,
                    settings,
                    folder,
                )
                module = fit(data)
            self._parts[known] = module.eval().requires_grad_(False)
        return self._parts[known]

    def given(self, trial: Trial) -> Given:
        """Return what a trial's method is made of, without its part."""
        bundle = self.bundle
        return Given(
            trial.k,
            self.classifier(trial.base, trial.seed),
            self.test.shape,
            len(bundle.info.classes),
            bundle.model,
            bundle.info,
            max(1, trial.missing),
        )

    def part(self, trial: Trial) -> nn.Module:
        """Return the part that a trial's method needs in addition to its base model."""
        method, given = find_method(trial.method), self.given(trial)
        budget = self.settings.budget(method.part)
        depends = {
            "method": trial.method,
            "base": trial.base,
            "k": trial.k,
            **self._images(trial.base),
            **method.identity(),
            **method.made_with(given, budget),
        }
        if trial.base == "resnet":
            depends["classifier"] = self._plain.model_dump(mode="json")

        folder, seed, base = self._part_folder(trial), trial.seed, trial.base

        make = partial(method.untrained, given, depends)
        fit = partial(train_part, method, given, budget=budget)
        return self._trained(folder, seed, base, budget, make, fit, depends)

    def _part_folder(self, trial: Trial) -> Path:
        return self.folder / f"{trial.method}-of-{trial.base}-k{trial.k}"

    def training_seconds(self, trial: Trial) -> float | None:
        """Return what training a trial's part took, or else its plain base model; None without."""
        folder = self._part_folder(trial)
        if not find_method(trial.method).part:
            if trial.base != "resnet":
                return None
            folder = self.folder / "resnet"
        seconds: float = load_checkpoint(folder / f"seed{trial.seed}" / LAST)[1]["seconds"]
        return seconds

    # Methods

    def check(self, trial: Trial) -> None:
        """Refuse a trial that cannot be done."""
        method, bundle = find_method(trial.method), self.bundle.info
        check_possible(trial, bundle, len(self.test))
        if isinstance(budget := self.settings.budget(method.part), PixelFusionSettings):
            served = bundle.provenance.settings
            check_settings(served.model_copy(update={"fusion": budget}), self.train, trial.k)

    def scheme(self, trial: Trial) -> Scheme:
        """Return a trial's scheme with everything it needs, trained if it was not."""
        method, given = find_method(trial.method), self.given(trial)
        if method.part:
            given = replace(given, part=self.part(trial))
        if method.tuned:
            rows = spread_rows(self.validation_rows, TUNING_IMAGES)
            groups = random_groups(len(rows), trial.k, torch.Generator().manual_seed(trial.k))
            queries, labels = self.train.batch(rows[groups.members.flatten()])
            shape = tuple(groups.members.shape)
            chosen = method.tune(given, queries.unflatten(0, shape), labels.view(shape))
            given = replace(given, chosen=chosen)
        return method.build(given)

    def depends(self, trial: Trial) -> dict[str, Any]:
        """Return what a trial's result depends on besides the grid: its key in the results."""
        method, settings = find_method(trial.method), self.settings
        found: dict[str, Any] = {
            **self._base(trial.base),
            "test_images": len(self.test),
            "test_digest": self._digests[1],
            "train_images": len(self.train_rows),
            "train_digest": self._digests[0],
        }
        if self.split != "test":
            found["split"] = self.split
        if trial.base == "resnet":
            found["classifier"] = self._plain.model_dump(mode="json")
        if method.part:
            found[method.part] = settings.budget(method.part).model_dump(mode="json")
        if method.tuned:
            found["tuning_images"] = TUNING_IMAGES
        if method.digest:
            found["method"] = method.digest
        return {**found, **method.versions()}


def _is_finished(folder: Path, epochs: int, settings: Mapping[str, Any]) -> bool:
    """Tell whether a folder has a finished training of so many epochs with these settings."""
    if not ((folder / LAST).is_file() and (folder / BEST).is_file()):
        return False
    header = load_checkpoint(folder / LAST)[1]
    return header["epoch"] >= epochs and not differing_keys(header["settings"], settings)
