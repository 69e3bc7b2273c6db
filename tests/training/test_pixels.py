"""The paper's objective, step by step; its stages are run in test_stages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.invnet import own_scheme
from codedinvnet.common.config import PixelFusionSettings, parse_settings
from codedinvnet.data import ImageRows, ImageSet, settings_split
from codedinvnet.models.bundle import Bundle
from codedinvnet.models.coded import CodedModel, build_model
from codedinvnet.training.fusion_data import FusionData
from codedinvnet.training.pixels import PixelStage
from tests.conftest import tiny_settings

K, BATCH, EPOCHS, RATE = 2, 4, 12, 0.1


def make_stage(images: ImageSet, model: CodedModel, steps: int = 1) -> PixelStage:
    """Return a stage on 24 groups, whose targets are darker than the average image."""
    settings = parse_settings(tiny_settings("pixels"), "here")
    assert isinstance(settings.fusion, PixelFusionSettings)
    changed = {
        "batch_size": BATCH,
        "discriminator_steps": steps,
        "members": K,
        "epochs": EPOCHS,
        "learning_rate": RATE,
    }
    fusion = settings.fusion.model_copy(update=changed)
    groups = torch.arange(24 * K).view(24, K)
    average = model.prepare(images.batch(groups.flatten())[0]).unflatten(0, (24, K)).mean(dim=1)
    torch.manual_seed(0)
    _, rows = settings_split(settings, images)
    data = FusionData(groups, 0.5 * average)
    validation, scheme = ImageRows(images, rows, "here"), own_scheme(model, K)
    stage = PixelStage(fusion, images, model, data, validation, scheme, seed=settings.seed)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    for module in stage.modules.values():
        module.train()
    return stage


@pytest.fixture
def model(bundle: Bundle) -> CodedModel:
    """Return a network with an encoder that has not learned anything."""
    description = bundle.info.model
    encoder = description.encoder.model_copy(update={"kind": "lean"})
    made = build_model(description.model_copy(update={"encoder": encoder}))
    torch.manual_seed(1)
    for parameter in made.encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def descend(stage: PixelStage) -> None:
    """Train by optimisers whose steps tell the gradient."""
    trained = zip(stage.optimizers, stage.modules.values(), strict=True)
    stage.optimizers = {name: torch.optim.SGD(m.parameters(), RATE) for name, m in trained}


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad]))


def moved(before: nn.Module, after: nn.Module) -> list[Tensor]:
    """Return the gradients that plain descent at RATE has followed."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [(a.detach() - b.detach()) / RATE for a, b in pairs if a.requires_grad]


def test_a_step_follows_the_losses_of_the_discriminator_and_then_of_the_encoder(
    held_out: ImageSet, model: CodedModel
) -> None:
    """Hinge losses; the cosh of the pixels and what the discriminator says, which moved first."""
    stage = make_stage(held_out, model)
    encoder, before = copy.deepcopy(model.encoder), copy.deepcopy(stage.discriminator)
    descend(stage)
    found = stage.step(0, 0)
    x, target = stage.batch(0)
    fake = encoder(x)
    real, made = before(x, target), before(x, fake.detach())
    hinge = F.relu(1 - real).mean() + F.relu(1 + made).mean()
    pixel = ((fake - target).exp() + (target - fake).exp()).mean() / 2
    loss = pixel - stage.discriminator(x, fake).mean()
    assert found["pixel"] == pytest.approx(pixel.item(), rel=1e-5)
    assert found["generator"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["discriminator"] == pytest.approx(hinge.item(), rel=1e-4)
    for own, was, now in ((hinge, before, stage.discriminator), (loss, encoder, model.encoder)):
        expected = gradients(own, was)
        assert any(gradient.abs().max() > 1e-3 for gradient in expected)
        for step, wanted in zip(moved(was, now), expected, strict=True):
            torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-4)
