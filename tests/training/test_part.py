"""Training of parts: plain and distilled classifiers, parity models, networks that see a group."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.erase import recovered_accuracy
from codedinvnet.codes.method import Given, given_by
from codedinvnet.codes.parm import ParityModel, ParM
from codedinvnet.common.config import PartSettings
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageRows, ImageSet, random_groups, sample_images
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.models.network import ImageNetwork, classifier_of
from codedinvnet.nn.resnet import ResNet
from codedinvnet.training.part import (
    LossStage,
    TrainingData,
    all_logits,
    train_classifier,
    train_part,
)
from tests.codes.linear import outputs_of

CPU = torch.device("cpu")
TRAIN, VALIDATION = torch.arange(600), torch.arange(600, 700)
BUDGET = PartSettings(epochs=1, steps_per_epoch=30, batch_size=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("mnist")


@pytest.fixture(scope="module")
def source() -> ImageSet:
    return sample_images("mnist")


@pytest.fixture
def data(bundle: Bundle, source: ImageSet, tmp_path: Path) -> TrainingData:
    """600 images with the bundle's own answers, and 100 to validate on."""
    return make_data(bundle, source, tmp_path)


def held(source: ImageSet) -> ImageRows:
    return ImageRows(source, VALIDATION, "here")


def make_data(
    bundle: Bundle, source: ImageSet, folder: Path, said: Tensor | None = None, **training: Any
) -> TrainingData:
    options = bundle.info.provenance.settings.training.model_copy(update=training)
    parts = {"train": ImageRows(source, TRAIN, "here"), "validation": held(source)}

    @cache
    def logits(split: str) -> Tensor:
        if said is not None:
            return said.expand(len(parts[split]), -1)
        return all_logits(classifier_of(bundle.model), parts[split], description="logits")

    return TrainingData(parts["train"], parts["validation"], logits, options, 0, CPU, {}, folder)


def pupil(width: int = 3, blocks: tuple[int, ...] = (1,)) -> ImageNetwork:
    torch.manual_seed(0)
    return ImageNetwork(ResNet(1, 10, width=width, blocks=blocks, squeeze=2), (1, 28, 28), 2)


def predicted(network: nn.Module, source: ImageSet) -> Tensor:
    return all_logits(network, held(source), description="logits").argmax(1)


def test_a_plain_classifier_learns_the_labels(
    bundle: Bundle, source: ImageSet, tmp_path: Path
) -> None:
    data = make_data(bundle, source, tmp_path, shift=0)
    budget = PartSettings(epochs=1, steps_per_epoch=120, batch_size=50, learning_rate=1e-2)
    small = pupil(8, (1, 1, 1))
    train_classifier(small, data, budget)
    assert float((predicted(small, source) == source.labels[VALIDATION]).float().mean()) > 0.6


def parity_stage(
    part: nn.Module, given: Given, data: TrainingData, budget: PartSettings
) -> LossStage:
    scheme = ParM().build(replace(given, part=part))

    def score() -> float:
        return recovered_accuracy(scheme, data.validation, data.logits("validation"))

    return LossStage(part, ParM().loss, data, budget, score, given.k)


def test_parm_learns_the_sum_and_its_score_is_the_accuracy_of_its_decoding(
    bundle: Bundle, data: TrainingData, source: ImageSet
) -> None:
    k, method = 2, ParM()
    given = given_by(bundle, k)
    torch.manual_seed(data.seed)
    start = method.untrained(given, {}).eval()
    before, _ = parity_stage(start, given, data, BUDGET).validate()
    part = train_part(method, given, data, BUDGET.model_copy(update={"learning_rate": 3e-4}))
    score = parity_stage(part, given, data, BUDGET).validate()[0]
    scheme = method.build(replace(given, part=part))
    assert score > before
    groups = random_groups(100, k, torch.Generator().manual_seed(k)).members
    images, labels = source.batch(VALIDATION[groups.flatten()])
    outputs = outputs_of(scheme, images.unflatten(0, (-1, k)))
    hits = 0
    for lost in range(k):
        rest = {task: output for task, output in outputs.items() if task != lost}
        answers = scheme.decode(rest, k)[lost].argmax(1)
        hits += int((answers == labels.view(-1, k)[:, lost]).sum())
    assert hits / 100 == pytest.approx(score)
    assert not any(p.requires_grad for p in bundle.model.parameters())


def test_too_few_images_for_a_group(bundle: Bundle, data: TrainingData) -> None:
    few = replace(data, validation=ImageRows(data.validation, torch.arange(3), "here"))
    with pytest.raises(UserError, match="k=4 cannot be drawn from 3 validation images"):
        parity_stage(ParityModel(pupil(), 4), given_by(bundle, 4), few, BUDGET)
