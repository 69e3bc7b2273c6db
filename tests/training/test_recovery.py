from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from codedinvnet.config import RecoveryFusionSettings, parse_settings
from codedinvnet.data import load_images
from codedinvnet.model import CodedModel, model_settings
from codedinvnet.nn.fusion import mosaic_grid
from codedinvnet.training.recovery import RecoveryStage, draw_size
from tests.conftest import tiny_settings

CPU = torch.device("cpu")
DRAWS = 4000


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
    settings = parse_settings(raw, "here")
    assert isinstance(settings.fusion, RecoveryFusionSettings)
    source = load_images("mnist", "train", data_dir=data_dir)
    model = CodedModel(model_settings(settings, source.shape, source.classes))
    stage = RecoveryStage(settings, settings.fusion, source, model, CPU, joint=True)
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
