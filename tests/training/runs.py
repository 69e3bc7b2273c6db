"""Runs of the paper's objective, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from codedinvnet.common.config import Settings
from codedinvnet.data import ImageSource, split_images
from codedinvnet.evaluation import stages
from codedinvnet.models.checkpoint import load_checkpoint
from codedinvnet.training.fusion_data import FusionData, load_fusion_data
from codedinvnet.training.network import NetworkStage, fresh_model
from tests.conftest import make_run, tiny_settings

CPU = torch.device("cpu")


def pixel_run(save_dir: Path, data_dir: Path, resume: int = 0, **fusion: Any) -> stages.Run:
    raw = tiny_settings("pixels")
    raw["fusion"].update(fusion)
    return make_run(raw, save_dir, data_dir, resume)


def network_stage(
    settings: Settings, source: ImageSource, kind: type[NetworkStage] = NetworkStage
) -> NetworkStage:
    model = fresh_model(settings, source.shape, source.classes)
    return kind(model, settings.training, *split_images(settings, source))


def fusion_data(run: stages.Run) -> FusionData:
    _, header = load_checkpoint(run.network_folder / "network.safetensors")
    weights = header["network_weights"]
    return load_fusion_data(run.settings, run.fusion_folder(2), 2, weights)


def shared_network(pixels: stages.Run, save_dir: Path, **options: Any) -> stages.Run:
    """Return a run of its own folder with the trained network of `pixels`."""
    assert pixels.data_dir is not None
    run = pixel_run(save_dir, pixels.data_dir, **options)
    run.network_folder.parent.mkdir(parents=True, exist_ok=True)
    if not run.network_folder.exists():
        run.network_folder.symlink_to(pixels.network_folder)
    return run
