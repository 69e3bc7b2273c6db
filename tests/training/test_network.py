"""The loss of f and g; their stage is run in test_stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from codedinvnet import stages
from codedinvnet.training.network import NetworkStage
from tests.conftest import make_run, tiny_settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("point", [0, 2, -1])
def test_mixup_mixes_at_a_layer_and_weighs_both_labels(
    point: int, data_dir: Path, tmp_path: Path
) -> None:
    """Verma et al., ICML 2019: λ h + (1 − λ) h', and λ of the loss for y, 1 − λ of that for y'."""
    raw = tiny_settings("recovery")
    raw["training"]["mixup"] = "manifold"
    run: stages.Run = make_run(raw, tmp_path, data_dir)
    stage = NetworkStage(run.settings, run.images("train"), CPU)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    steps = list(stage.network.steps())
    place = point % (len(steps) + 1)
    stage.points = [place]
    images, labels = stage.source.batch(torch.arange(16))
    x = stage_input = F.pad(images.float() / 255, (2,) * 4)
    stage.generator = torch.Generator().manual_seed(5)
    loss = stage.mixup_loss(stage_input, labels)

    draws = torch.Generator().manual_seed(5)
    torch.randint(1, (), generator=draws)
    alpha = torch.full((2,), run.settings.training.mixup_alpha, dtype=torch.float64)
    share = float(torch._sample_dirichlet(alpha, draws)[0])
    partner = torch.randperm(16, generator=draws)
    assert 0.02 < share < 0.98
    for step in steps[:place]:
        x = step(x)
    x = share * x + (1 - share) * x[partner]
    for step in steps[place:]:
        x = step(x)
    log = stage.head(x).log_softmax(1)
    rows = torch.arange(16)
    own, other = log[rows, labels], log[rows, labels[partner]]
    expected = -(share * own + (1 - share) * other).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(-own.mean().item(), rel=1e-4)
