from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.config import RecoveryFusionSettings, parse_settings
from codedinvnet.data import ImageSet, load_images
from codedinvnet.models.coded import CodedModel, decode_missing, model_settings
from codedinvnet.nn.fusion import mosaic_grid
from codedinvnet.training import recovery
from codedinvnet.training.loop import warmup_cosine
from codedinvnet.training.network import NetworkStage
from codedinvnet.training.recovery import RecoveryStage, draw_size
from tests.conftest import tiny_settings

CPU = torch.device("cpu")
DRAWS = 4000


def stage_of(raw: dict[str, Any], data_dir: Path, joint: bool) -> RecoveryStage:
    """Return a stage with these settings, on the tests' images, of a network drawn from seed 0."""
    settings = parse_settings(raw, "here")
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    source = load_images("mnist", "train", data_dir=data_dir)
    torch.manual_seed(0)
    model = CodedModel(model_settings(settings, source.shape, source.classes))
    return RecoveryStage(settings, settings.fusion, source, model, CPU, joint=joint)


def drawn(largest: int, apart: bool) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(draw_size(largest, apart, generator) for _ in range(DRAWS))


@pytest.mark.parametrize("largest", [2, 10])
def test_every_size_is_drawn_equally_often(largest: int) -> None:
    counts = drawn(largest, apart=False)
    assert sorted(counts) == list(range(2, largest + 1))
    for count in counts.values():
        assert count == pytest.approx(DRAWS / (largest - 1), rel=0.15)


@pytest.mark.parametrize(("largest", "grids"), [(2, 1), (3, 2), (10, 4)])
def test_every_grid_of_a_mosaic_is_drawn_equally_often(largest: int, grids: int) -> None:
    sizes = drawn(largest, apart=True)
    assert sorted(sizes) == list(range(2, largest + 1))
    counts: Counter[tuple[int, int]] = Counter()
    for size, count in sizes.items():
        counts[mosaic_grid(size)] += count
    assert len(counts) == grids
    for count in counts.values():
        assert count == pytest.approx(DRAWS / grids, rel=0.15)


@pytest.mark.parametrize(("share", "answered"), [(0.001, 1), (0.5, 8)])
def test_some_image_of_a_joint_step_is_answered_directly(
    share: float, answered: int, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny_settings()
    raw["fusion"] |= {
        "encoder": {"kind": "mosaic", "width": 4},
        "latent_weight": 0.0,
        "normal_share": share,
    }
    stage = stage_of(raw, data_dir, joint=True)
    model = stage.model
    counts = []
    classify = model.classify

    def counted(latents: torch.Tensor) -> torch.Tensor:
        counts.append(len(latents))
        return classify(latents)

    monkeypatch.setattr(model, "classify", counted)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    scalars = stage.step(0, 0)
    assert all(math.isfinite(value) for value in scalars.values())
    assert counts == [answered]  # of 4 groups of 4


@pytest.mark.parametrize("distilled", [0.0, 0.6])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", ["lean", "mosaic"])
def test_a_step_follows_the_loss(
    kind: str, joint: bool, distilled: float, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every member is decoded as it would be served; all terms have weights of their own."""
    members, rate = 3, 0.1
    weights = {"decoded_weight": 0.7, "evidence_weight": 0.3, "normal_weight": 1.7}
    raw = tiny_settings()
    raw["fusion"] |= {
        **weights,
        "distilled_share": distilled,
        "normal_share": 1.0 if kind == "lean" else 0.5,
        "latent_weight": 0.4 if kind == "lean" else 0.0,
        "encoder": {"kind": kind, "width": 4, "side_features": 4},
    }
    stage = stage_of(raw, data_dir, joint)
    source, model = stage.source, stage.model
    seen: list[tuple[Tensor, Tensor]] = []
    batch = source.batch

    def noted(rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(batch(rows))
        return seen[-1]

    stage.start_epoch(0, torch.Generator().manual_seed(0))
    if not joint:
        stage.cached_latents()
    monkeypatch.setattr(recovery, "draw_size", lambda *_: members)
    projected: list[object] = []
    monkeypatch.setattr(recovery, "project", projected.append)
    monkeypatch.setattr(recovery, "GRADIENT_NORM", math.inf)
    monkeypatch.setattr(stage, "source", SimpleNamespace(batch=noted))
    stage.optimizer = torch.optim.SGD(model.parameters(), rate)  # type: ignore[assignment]
    monkeypatch.setattr(recovery, "set_rate", lambda *_: None)
    before = copy.deepcopy(model)
    stage.step(0, 0)
    assert projected == ([model.network] if joint else [])
    (images, labels) = seen[0]

    groups = images.unflatten(0, (-1, members))
    sent = before.encode(groups)
    z = before.embed(images).unflatten(0, groups.shape[:2])
    side = sent.side.flatten(0, 1)
    latents = torch.stack(
        [
            decode_missing(sent.latent, torch.cat([z[:, :i], z[:, i + 1 :]], dim=1))
            if kind == "lean"
            else sent.latent
            for i in range(members)
        ],
        dim=1,
    ).flatten(0, 1)
    answered = len(labels) if kind == "lean" else round(stage.fusion.normal_share * len(labels))
    direct = before.classify(z.flatten(0, 1)[:answered])
    answers = before.recover(latents, side, members)
    alike = F.cross_entropy(answers[:answered], direct.detach().softmax(1))
    terms = {
        "decoded_weight": (1 - distilled) * F.cross_entropy(answers, labels) + distilled * alike,
        "evidence_weight": F.cross_entropy(
            before.recover_from_latent(latents, side, members), labels
        )
        + F.cross_entropy(before.recover_from_side(side), labels),
    }
    if joint:
        terms["normal_weight"] = F.cross_entropy(direct, labels[:answered])
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    if kind == "lean":
        loss = loss + 0.4 * (members * sent.latent - z.sum(dim=1)).square().mean()
    trained = [name for name, p in before.named_parameters() if p.requires_grad]
    was, now = dict(before.named_parameters()), dict(model.named_parameters())
    expected = torch.autograd.grad(loss, [was[name] for name in trained], allow_unused=True)
    assert joint == any(name.startswith("network.") for name in trained)
    for name, gradient in zip(trained, expected, strict=True):
        moved = (was[name] - now[name]).detach() / rate
        wanted = torch.zeros_like(moved) if gradient is None else gradient
        torch.testing.assert_close(moved, wanted, rtol=2e-3, atol=2e-4, msg=name)


def test_latents_that_do_not_fit_are_computed_in_every_step(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse_settings(tiny_settings(), "here")
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    source = load_images("mnist", "train", data_dir=data_dir)
    torch.manual_seed(0)
    model = CodedModel(model_settings(settings, source.shape, source.classes))
    found = []
    for spare in (0, -1):  # in bytes
        stage = RecoveryStage(
            settings, settings.fusion, source, copy.deepcopy(model), CPU, joint=False
        )
        size = 4 * len(stage.train_rows) * math.prod(model.latent_shape)
        monkeypatch.setattr(recovery, "KEPT_BYTES", size + spare)
        stage.start_epoch(0, torch.Generator().manual_seed(0))
        scalars = stage.step(0, 0)
        assert (stage.latents is None) == (spare < 0)
        found.append((scalars, stage.model.encoder.state_dict()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_the_rate_follows_its_curve_and_gradients_are_clipped(
    joint: bool, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(tiny_settings(), data_dir, joint)
    fusion, model = stage.fusion, stage.model
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    full = fusion.joint_learning_rate if joint else fusion.learning_rate
    for step in (0, 3, stage.total_steps - 1):
        stage.step(*divmod(step, stage.steps_per_epoch))
        factor = warmup_cosine(step, stage.total_steps, recovery.WARMUP)
        assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(full * factor)
    monkeypatch.setattr(recovery, "GRADIENT_NORM", 1e-6)
    monkeypatch.setattr(recovery, "project", lambda _: None)
    stage.optimizer = torch.optim.SGD(model.parameters(), 1.0)  # type: ignore[assignment]
    monkeypatch.setattr(recovery, "set_rate", lambda *_: None)
    before = copy.deepcopy(model)
    stage.step(0, 0)
    moved = [
        (now - was).norm() for was, now in zip(before.parameters(), model.parameters(), strict=True)
    ]
    assert 0 < float(torch.stack(moved).norm().detach()) < 2e-6


@pytest.mark.parametrize("joint", [False, True])
def test_batch_statistics_are_those_that_are_served_in_the_last_joint_epochs(
    joint: bool, data_dir: Path
) -> None:
    raw = tiny_settings(kind="irevnet")
    raw["fusion"] |= {"epochs": 10, "joint_epochs": 10}
    stage = stage_of(raw, data_dir, joint)
    model = stage.model
    drawn_anew = []
    for epoch in range(10):
        model.train()  # as before every epoch
        stage.start_epoch(epoch, torch.Generator().manual_seed(0))
        assert model.encoder.training == (not joint or epoch < 8)
        drawn_anew.append(model.network.training)
    assert drawn_anew == ([True] * 8 + [False] * 2 if joint else [False] * 10)


def test_batch_statistics_stay_as_they_were_trained_while_a_recovery_head_is_initialised(
    data_dir: Path,
) -> None:
    """Joint training initialises it where no other goes before."""
    raw = tiny_settings(kind="irevnet")
    raw["fusion"] |= {"epochs": 0}
    stage = stage_of(raw, data_dir, joint=True)
    network = stage.model.network.train()
    before = copy.deepcopy(network.state_dict())
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.state_dict(), before, rtol=0.0, atol=0.0)
    assert network.training


@pytest.mark.parametrize("stage", [NetworkStage, RecoveryStage])
def test_what_is_initialised_sees_all_classes_of_a_sorted_set(
    stage: type[NetworkStage | RecoveryStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an image folder is, whose first images are of one class."""
    raw = tiny_settings()
    settings = parse_settings(raw, "here")
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    labels = torch.arange(10).repeat_interleave(150)
    images = torch.randint(0, 256, (1500, 1, 28, 28), dtype=torch.uint8)
    source = ImageSet("sorted", tuple("0123456789"), images, labels, "here")
    model = CodedModel(model_settings(settings, source.shape, source.classes))
    made = (
        NetworkStage(settings, source, CPU)
        if stage is NetworkStage
        else RecoveryStage(settings, settings.fusion, source, model, CPU, joint=False)
    )
    seen: list[Tensor] = []

    def noted(rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(labels[rows])
        return images[rows], labels[rows]

    monkeypatch.setattr(made, "source", SimpleNamespace(batch=noted))
    made.initialise()
    (classes,) = seen
    assert min(classes.bincount(minlength=10).tolist()) > 0.08 * len(classes)
