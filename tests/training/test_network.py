"""The loss of f and g; their stage is run in test_stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from codedinvnet.evaluation import stages
from codedinvnet.nn.iresnet import steps as steps_of
from codedinvnet.training.network import augment
from tests.conftest import make_run, tiny_settings
from tests.training.runs import network_stage


def test_images_are_mirrored_and_shifted_each_for_itself() -> None:
    """One bright pixel in each image, of a brightness of its own."""
    count = 400
    brightness = torch.arange(1.0, count + 1)
    x = torch.zeros(count, 1, 7, 7)
    x[:, 0, 3, 2] = brightness
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(x, False, 0, generator), x)
    mirrored = augment(x, True, 0, generator)
    assert torch.equal(mirrored[:, 0, 3, 2] + mirrored[:, 0, 3, 4], brightness)
    assert 0.4 < float((mirrored[:, 0, 3, 4] > 0).float().mean()) < 0.6
    shifted = augment(x, False, 2, generator)
    assert torch.equal(shifted.sum((1, 2, 3)), brightness)
    places = {(row, column) for _, _, row, column in shifted.nonzero().tolist()}
    assert places == {(row, column) for row in range(1, 6) for column in range(5)}


@pytest.mark.parametrize("point", [0, 2, -1])
def test_mixup_mixes_images_and_labels_by_one_share(
    point: int, data_dir: Path, tmp_path: Path
) -> None:
    """Verma et al., ICML 2019: λ h + (1 − λ) h', and λ of the loss for y, 1 − λ of that for y'."""
    raw = tiny_settings("recovery")
    raw["training"]["mixup"] = "manifold"
    run: stages.Run = make_run(raw, tmp_path, data_dir)
    stage = network_stage(run.settings, run.images("train"))
    stage.start_epoch(0, torch.Generator().manual_seed(0))
    stage.points = [point % (len(steps_of(stage.model.network)) + 1)]
    image = F.pad(stage.train.batch(torch.arange(1))[0].float() / 255, (2,) * 4)
    log = stage.model.head(stage.model.network(image)).log_softmax(1)[0]

    same = stage.mixup_loss(image.repeat(16, 1, 1, 1), torch.full((16,), 3))
    assert same.item() == pytest.approx(-log[3].item(), rel=1e-5)  # with itself an image stays
    labels = torch.tensor([3, 7] * 8)
    mixed = stage.mixup_loss(image.repeat(16, 1, 1, 1), labels)
    assert mixed.item() == pytest.approx(-(log[3] + log[7]).item() / 2, rel=1e-5)
    two = torch.cat([image, 1 - image]).repeat(8, 1, 1, 1)
    plain = F.cross_entropy(stage.model.head(stage.model.network(two)), labels)
    assert stage.mixup_loss(two, labels).item() != pytest.approx(plain.item(), rel=1e-4)
