from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from codedinvnet.common.config import RecoveryFusionSettings, parse_settings
from codedinvnet.data import load_images, split_images
from codedinvnet.models.coded import build_model, decode_missing, model_settings
from codedinvnet.training.recovery import RecoveryStage
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


@pytest.mark.parametrize("joint", [False, True])
def test_steps_bring_decoded_answers_nearer_to_the_labels(joint: bool, data_dir: Path) -> None:
    stage = stage_of(tiny_settings(), data_dir, joint)
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    images, labels = stage.train.batch(torch.arange(96))
    groups = images.unflatten(0, (24, 4))

    def loss() -> float:
        """Of each member as the missing one."""
        model = stage.model
        with torch.no_grad():
            sent, z = model.encode(groups), model.embed(images).unflatten(0, (24, 4))
            found = []
            for lost in range(4):
                others = torch.cat([z[:, :lost], z[:, lost + 1 :]], dim=1)
                answers = model.classify(decode_missing(sent, others))
                found.append(F.cross_entropy(answers, labels.unflatten(0, (24, 4))[:, lost]))
        return float(torch.stack(found).mean())

    before = loss()
    for index in range(stage.steps_per_epoch):
        stage.step(0, index)
    assert loss() < before


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
