from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.common.config import RecoveryFusionSettings, parse_settings
from codedinvnet.data import load_images, split_images
from codedinvnet.models.coded import build_model, decode_missing, model_settings
from codedinvnet.training import recovery
from codedinvnet.training.recovery import RecoveryStage, draw_size
from tests.conftest import tiny_settings


def stage_of(raw: dict[str, Any], data_dir: Path, joint: bool) -> RecoveryStage:
    """Return a stage with these settings, on the tests' images, of a network drawn from seed 0."""
    settings = parse_settings(raw, "here")
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    source = load_images("mnist", "train", data_dir=data_dir)
    torch.manual_seed(0)
    model = build_model(model_settings(settings, source.shape, source.classes))
    images = split_images(settings, source)
    return RecoveryStage(settings.fusion, settings.training, *images, model, {}, joint=joint)


@pytest.mark.parametrize("apart", [False, True])
def test_sizes_are_drawn_alike_or_by_the_mosaics_grids(apart: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(draw_size(5, apart, generator) for _ in range(4000))
    shares = {2: 1 / 3, 3: 1 / 6, 4: 1 / 6, 5: 1 / 3} if apart else dict.fromkeys(range(2, 6), 0.25)
    assert {size: count / 4000 for size, count in drawn.items()} == pytest.approx(shares, abs=0.03)


@pytest.mark.parametrize("distilled", [0.0, 0.6])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", ["lean", "mosaic"])
def test_a_step_follows_the_loss(
    kind: str, joint: bool, distilled: float, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every member is decoded as it would be served; all terms have weights of their own."""
    members, rate = 3, 0.1
    weights = {"evidence_weight": 0.3, "normal_weight": 1.7}
    raw = tiny_settings()
    raw["fusion"] |= {
        **weights,
        "distilled_share": distilled,
        "normal_share": 1.0 if kind == "lean" else 0.5,
        "latent_weight": 0.4 if kind == "lean" else 0.0,
        "encoder": {"kind": kind, "width": 4, "side_features": 4},
    }
    stage = stage_of(raw, data_dir, joint)
    source, model = stage.train, stage.model
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
    stage.gradient_norm = None
    monkeypatch.setattr(stage.train, "batch", noted)
    stage.optimizers = {"optimizer": torch.optim.SGD(model.parameters(), rate)}
    monkeypatch.setattr(stage, "set_rate", lambda *_: None)
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
    decoded = (1 - distilled) * F.cross_entropy(answers, labels) + distilled * alike
    terms = {
        "evidence_weight": F.cross_entropy(
            before.recover_from_latent(latents, side, members), labels
        )
        + F.cross_entropy(before.recover_from_side(side), labels),
    }
    if joint:
        terms["normal_weight"] = F.cross_entropy(direct, labels[:answered])
    loss = decoded + torch.stack([weights[name] * term for name, term in terms.items()]).sum()
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
