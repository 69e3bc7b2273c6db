from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codedinvnet.codes.method import Lessons, given_by
from codedinvnet.codes.parm import (
    ParityModel,
    ParM,
    SumCode,
)
from codedinvnet.codes.registry import find_method
from codedinvnet.config import PartSettings
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.network import ImageNetwork, classifier_of
from codedinvnet.nn.resnet import ResNet
from codedinvnet.training.classifier import ClassifierStage, all_logits
from codedinvnet.training.loop import train_stage, warmup_cosine
from codedinvnet.training.parity import MembersStage, ParityStage, Taught
from codedinvnet.training.part import WARMUP, PartStage
from tests.codes.linear import made, outputs_of

PART = PartSettings(epochs=2, steps_per_epoch=30, batch_size=16, learning_rate=3e-3)
CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"flip": False, "shift": 0}
ROWS = (torch.arange(600), torch.arange(600, 700))


@pytest.fixture(scope="module")
def source() -> ImageSet:
    return sample_images("mnist")


@pytest.fixture(scope="module")
def classifier(source: ImageSet) -> ImageNetwork:
    """A small classifier that is right most of the time."""
    torch.manual_seed(0)
    small = ImageNetwork(ResNet(1, 10, width=8, blocks=(1, 1, 1), squeeze=2), (1, 28, 28), 2)
    part = PartSettings(epochs=1, steps_per_epoch=120, batch_size=50, learning_rate=1e-2)
    stage = ClassifierStage(small, source, *ROWS, part, flip=False, shift=0)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    small.train()
    for index in range(part.steps_per_epoch):
        stage.step(0, index)
    return small.eval().requires_grad_(False)


def taught(classifier: ImageNetwork, source: ImageSet) -> tuple[Taught, Taught]:
    train, validation = (
        Taught(source, rows, all_logits(classifier, source, rows, description="logits"))
        for rows in ROWS
    )
    return train, validation


def test_a_plain_classifier_learns(classifier: ImageNetwork, source: ImageSet) -> None:
    logits = all_logits(classifier, source, ROWS[1], description="logits")
    labels = source.batch(ROWS[1])[1]
    assert float((logits.argmax(1) == labels).float().mean()) > 0.6
    assert not logits.requires_grad


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_trains_in_the_precision_that_was_asked_for(
    precision: str, source: ImageSet, bfloat16_instructions: None
) -> None:
    network, seen = ResNet(1, 10, width=3, blocks=(1,), squeeze=2), []
    network.classify.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    pupil = ImageNetwork(network, (1, 28, 28), padding=2)
    stage = ClassifierStage(pupil, source, *ROWS, PART, flip=False, shift=0, precision=precision)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    assert stage.step(0, 0)["loss"] > 0
    assert seen == [getattr(torch, precision)]
    assert all(p.dtype == torch.float32 for p in pupil.parameters())


def test_a_teacher_is_followed_even_where_it_is_wrong(source: ImageSet) -> None:
    """With a teacher that calls everything 7, so does its pupil."""
    torch.manual_seed(0)
    pupil = ImageNetwork(ResNet(1, 10, width=3, blocks=(1,), squeeze=2), (1, 28, 28), 2)
    teacher = torch.full((600, 10), -20.0)
    teacher[:, 7] = 20.0
    stage = ClassifierStage(pupil, source, *ROWS, PART, flip=True, shift=1, teacher=teacher)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    for index in range(20):
        stage.step(0, index)
    pupil.eval()
    found = all_logits(pupil, source, ROWS[1], description="logits").argmax(1)
    assert float((found == 7).float().mean()) > 0.9


def test_a_pupil_follows_its_teacher_and_the_labels(source: ImageSet) -> None:
    torch.manual_seed(0)
    pupil = ImageNetwork(ResNet(1, 10, width=3, blocks=(1,), squeeze=2), (1, 28, 28), 2).eval()
    teacher = torch.randn(600, 10)
    stage = ClassifierStage(pupil, source, *ROWS, PART, flip=False, shift=0, teacher=teacher)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    loss = stage.batch_loss(1)
    chosen = stage.order[PART.batch_size : 2 * PART.batch_size]
    images, labels = source.batch(chosen)
    logits = pupil(images.float() / 255)
    parts = F.cross_entropy(logits, teacher[chosen].softmax(1)), F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, 0.7 * parts[0] + 0.3 * parts[1])
    for step in (0, PART.epochs * PART.steps_per_epoch - 1):
        stage.step(*divmod(step, PART.steps_per_epoch))
        factor = warmup_cosine(step, stage.total_steps, WARMUP)
        assert stage.optimizer.param_groups[0]["lr"] == PART.learning_rate * factor


def test_a_parity_model_learns_the_sum(
    classifier: ImageNetwork, source: ImageSet, tmp_path: Path
) -> None:
    k = 2
    model = ParityModel(copy.deepcopy(classifier).requires_grad_(True), k)
    stage = ParityStage(model, SumCode.mix, *taught(classifier, source), k, PART, **PLAIN)
    model.eval()
    before, _ = stage.validate()
    header = train_stage(stage, tmp_path, epochs=2, seed=1, settings={})
    assert header["score"] > before
    assert header["score"] == stage.validate()[0]
    # The stage's score is the accuracy of the method's own decoding.
    method = made(ParM, classifier, k, part=model.eval(), classes=10)
    rows = ROWS[1]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(k)).view(-1, k)
    images, labels = source.batch(rows[order.flatten()])
    group = images.unflatten(0, (-1, k))
    outputs = outputs_of(method, group)
    hits = 0
    for lost in range(k):
        rest = {t: o for t, o in outputs.items() if t != lost}
        hits += int((method.decode(rest, k)[lost].argmax(1) == labels.view(-1, k)[:, lost]).sum())
    assert hits / 100 == pytest.approx(header["score"])


@pytest.mark.parametrize("augment", [False, True])
def test_a_parity_model_sees_varied_images_and_learns_the_logits_of_the_originals(
    augment: bool, source: ImageSet
) -> None:
    bundle = load_bundle("mnist")
    settings = bundle.info.provenance.settings
    options = settings.training.model_copy(update={"flip": True})
    settings = settings.model_copy(update={"training": options})
    assert options.shift
    logits = torch.randn(600, 10)
    part = PartSettings(epochs=1, batch_size=8, augment=augment)
    lessons = Lessons(
        *(part, 0, source, *ROWS, lambda split: logits, nn.Identity),
        *(settings, CPU),
    )
    given = given_by(bundle, 2)
    stage = ParM().stage(ParM().untrained(given, {}), given, lessons)
    assert isinstance(stage, ParityStage)
    groups = source.batch(ROWS[0][:16])[0].unflatten(0, (8, 2)).float() / 255
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    seen = []
    stage.encode = lambda images: seen.append(images) or images.mean(dim=1)  # type: ignore[func-returns-value]
    loss = stage.loss(groups, logits[:16].unflatten(0, (8, 2)), torch.zeros(8, 2))
    [views] = seen
    wanted = F.mse_loss(
        stage.module(views.mean(dim=1)), logits[:16].unflatten(0, (8, 2)).sum(dim=1)
    )
    torch.testing.assert_close(loss, wanted)
    if not augment:
        assert torch.equal(views, groups)
        return
    reach = range(-options.shift, options.shift + 1)
    mirrored = []
    for view, image in zip(views.flatten(0, 1), groups.flatten(0, 1), strict=True):
        as_it_is, backwards = (
            any(torch.equal(view, F.pad(one, (x, -x, y, -y))) for x in reach for y in reach)
            for one in (image, image.flip(2))
        )
        assert as_it_is or backwards
        mirrored.append(not as_it_is)
    assert 0 < sum(mirrored) < len(mirrored)
    assert not torch.equal(views, groups)


def test_gradients_of_a_parity_model_are_clipped(
    classifier: ImageNetwork, source: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    k = 2
    model = ParityModel(copy.deepcopy(classifier).requires_grad_(True), k)
    stage = ParityStage(model, SumCode.mix, *taught(classifier, source), k, PART, **PLAIN)
    assert stage.gradient_norm == 5
    monkeypatch.setattr(stage, "gradient_norm", 1e-6)
    monkeypatch.setattr("codedinvnet.training.part.set_rate", lambda *_: None)
    stage.optimizer = torch.optim.SGD(model.parameters(), 1.0)  # type: ignore[assignment]
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    before = copy.deepcopy(model)
    stage.step(0, 0)
    moved = [
        (now - was).norm() for was, now in zip(before.parameters(), model.parameters(), strict=True)
    ]
    assert 0 < float(torch.stack(moved).norm().detach()) < 2e-6


def test_too_few_images_for_a_group(classifier: ImageNetwork, source: ImageSet) -> None:
    train, validation = taught(classifier, source)
    few = Taught(source, validation.rows[:3], validation.logits[:3])
    with pytest.raises(UserError, match="k=4 cannot be drawn from 3 validation images"):
        ParityStage(ParityModel(classifier, 4), SumCode.mix, train, few, 4, PART, **PLAIN)


def test_a_bundles_network_may_become_a_parity_model() -> None:
    bundle = load_bundle("mnist")
    own = copy.deepcopy(classifier_of(bundle.model)).requires_grad_(True)
    model = ParityModel(own, 2)
    model(torch.rand(2, 1, 28, 28)).sum().backward()
    gradients = [p.grad is not None for p in model.parameters()]
    assert all(gradients)
    assert not any(p.requires_grad for p in bundle.model.parameters())


@pytest.mark.parametrize(("name", "k"), [("collage@0.3", 4), ("superposition@0.3", 2)])
def test_a_network_learns_to_answer_for_a_group(name: str, k: int) -> None:
    part, stage = members_stage(name, k)
    first, _ = stage.validate()
    run_steps(part, stage, 60)
    recovered, scalars = stage.validate()
    assert recovered == scalars["validation_recovered"] > max(0.3, first)


def members_stage(name: str, k: int) -> tuple[nn.Module, MembersStage]:
    """Return a method's part around the bundle `mnist`, and its training on 600 images."""
    bundle, method = load_bundle("mnist"), find_method(name)
    given, images = given_by(bundle, k), sample_images("mnist")
    torch.manual_seed(0)
    part = method.untrained(given, method.made_with(given, None)).eval()
    logits = {
        split: all_logits(given.classifier, images, rows, description="logits")
        for split, rows in zip(("train", "validation"), ROWS, strict=True)
    }
    lessons = Lessons(
        PartSettings(epochs=1, steps_per_epoch=60, batch_size=64, learning_rate=1e-2),
        *(0, images, *ROWS, logits.__getitem__, lambda: given.classifier),
        *(bundle.info.provenance.settings, CPU),
    )
    stage = method.stage(part, given, lessons)
    assert isinstance(stage, MembersStage)
    return part, stage


def run_steps(part: nn.Module, stage: PartStage, steps: int) -> None:
    part.train()
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    for index in range(steps):
        stage.step(0, index)
    part.eval()


@pytest.mark.parametrize(("consistent", "followed"), [(False, 1), (True, 0)])
@pytest.mark.parametrize("name", ["collage", "small-backup"])
def test_a_consistent_teacher_answers_the_views_that_the_learner_sees(
    name: str, consistent: bool, followed: int
) -> None:
    """It takes everything for a 0; of the images as they are it said 1."""
    bundle, method, images = load_bundle("mnist"), find_method(name), sample_images("mnist")
    given, seen = given_by(bundle, 4), []

    class Teacher(nn.Module):
        def forward(self, views: torch.Tensor) -> torch.Tensor:
            seen.append(views)
            return 20.0 * F.one_hot(torch.zeros(len(views), dtype=torch.long), 10)

    said = 20.0 * F.one_hot(torch.ones(600, dtype=torch.long), 10)
    lessons = Lessons(
        PartSettings(epochs=1, batch_size=32, learning_rate=1e-2, consistent_teacher=consistent),
        *(0, images, *ROWS, lambda split: said, Teacher),
        *(bundle.info.provenance.settings, CPU),
    )
    torch.manual_seed(0)
    part = method.untrained(given, method.made_with(given, None))
    stage = method.stage(part, given, lessons)
    assert isinstance(stage, PartStage)
    run_steps(part, stage, 30)
    group = images.batch(torch.arange(4))[0].float() / 255
    answers = part(group[None])[0] if name == "collage" else part(group)
    assert answers.argmax(-1).tolist() == [followed] * 4
    if consistent:
        known = {image.numpy().tobytes() for image in images.batch(ROWS[0])[0].float() / 255}
        assert any(view.numpy().tobytes() not in known for views in seen for view in views)
    else:
        assert not seen
