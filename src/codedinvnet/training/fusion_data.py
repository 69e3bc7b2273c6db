"""Stage 2 of the paper: the fusion data set, groups of images with f⁻¹(mean z) as the target."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from codedinvnet.common.config import PixelFusionSettings, Settings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource, settings_split
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.models.coded import invertible, prepare
from codedinvnet.nn.lipschitz import fold
from codedinvnet.nn.transform import NotConverged
from codedinvnet.training.loop import NETWORK_WEIGHTS, check_alike, differing_keys
from codedinvnet.training.network import (
    as_trained,
    check_network_images,
    load_trained_network,
    network_settings,
)

INVERSION_BATCH = 128
TOLERANCE = 1e-4  # of a block's residual; a grey level is 39 times it, the targets need no more
DATA = "data/train.safetensors"
"""The data set, in a fusion's folder."""
ERROR = "largest_latent_error"
"""In its header and in the report: the largest difference between f(target) and mean z."""
SECONDS = "seconds"
"""Likewise: what the inversions took."""
AGAIN = "make it again (main.py -fusion -sample_fusion)"


class FusionData(NamedTuple):
    """Groups and targets: rows of the training images (N, k), and images (N, C, H, W)."""

    groups: Tensor
    targets: Tensor


def pixel_settings(settings: Settings) -> PixelFusionSettings:
    """Return the fusion section if it has the paper's objective."""
    if not isinstance(settings.fusion, PixelFusionSettings):
        raise UserError(
            f"{settings.name}: the objective 'recovery' draws new groups in every step and "
            "has no fusion data set: go on with the fusion training itself"
        )
    return settings.fusion


def draw_groups(rows: Tensor, count: int, members: int, generator: torch.Generator) -> Tensor:
    """Draw `count` groups (count, members) from rows, going through all rows before repeating."""
    if members > len(rows):
        raise UserError(f"groups of {members} cannot be drawn from {len(rows)} images")
    per_pass = len(rows) // members
    passes = [
        rows[torch.randperm(len(rows), generator=generator)][: per_pass * members].view(-1, members)
        for _ in range(-(-count // per_pass))
    ]
    return torch.cat(passes)[:count]


def sample_fusion_data(
    settings: Settings,
    source: ImageSource,
    network_folder: Path,
    folder: Path,
    *,
    members: int,
    device: torch.device,
    resume: bool,
) -> dict[str, Any]:
    """Generate the fusion data set in `folder/data`; with `resume`, one that is there is kept.

    Returns:
        What is there, the largest difference between f(target) and mean z in it, and the seconds
        that it took.
    """
    fusion = pixel_settings(settings)
    model, header = load_trained_network(settings, network_folder, device)
    check_network_images(source, header)
    settings = as_trained(settings, network_folder, header)
    fold(model.network)
    train, _ = settings_split(settings, source)
    generator = torch.Generator().manual_seed(settings.seed + members)
    groups = draw_groups(train, fusion.groups, members, generator)
    depends = _depends(settings, members, header[NETWORK_WEIGHTS])
    path = folder / DATA
    made = _current(path, depends) if resume else None
    if made is None:
        began = time.monotonic()
        with Progress(total=len(groups), desc="fusion data", unit="group") as bar:
            targets, error = invert_means(
                model.network, source, groups, padding=settings.data.padding, bar=bar
            )
        made = {ERROR: error, SECONDS: round(time.monotonic() - began, 1)}
        tensors = {"groups": groups, "targets": targets}
        save_checkpoint(path, tensors, {"settings": depends, **made})
    return {"groups": fusion.groups, "members": members, **made}


def invert_means(
    f: nn.Module, source: ImageSource, groups: Tensor, *, padding: int, bar: Progress
) -> tuple[Tensor, float]:
    """Return f⁻¹(mean z) for every group, and how far f of it is from the mean at most."""
    network = invertible(f)
    device = first_tensor(network).device
    targets, worst = [], 0.0
    for batch in groups.split(INVERSION_BATCH):
        images, _ = source.batch(batch.flatten())
        with torch.inference_mode():
            latents = network(prepare(images.to(device), padding))
            mean = latents.unflatten(0, tuple(batch.shape)).mean(dim=1)
            try:
                target = network.inverse(mean, tolerance=TOLERANCE)
            except NotConverged as problem:
                raise UserError(
                    f"the network cannot be inverted at a mean latent ({problem}); "
                    "train it longer or with a smaller network.coefficient"
                ) from problem
            error = float((network(target) - mean).abs().max())
            if not math.isfinite(error):  # an i-RevNet's inverse is computed without a check
                raise UserError(
                    "the network's inverse of a mean latent is not finite in float32: the paper's "
                    "objective needs a bounded network (network.kind iresnet)"
                )
            worst = max(worst, error)
        targets.append(target.cpu())
        bar.update(len(batch))
    return torch.cat(targets), worst


def _current(path: Path, depends: dict[str, Any]) -> dict[str, float] | None:
    """Return the latent error and the seconds of a data set; None if it must be made."""
    try:
        _, header = load_checkpoint(path)
    except UserError:
        return None
    same = not differing_keys(header.get("settings", {}), depends)
    return {key: header[key] for key in (ERROR, SECONDS)} if same else None


def _depends(settings: Settings, members: int, weights: str) -> dict[str, Any]:
    """Return what a data set depends on."""
    return {
        **network_settings(settings),
        "groups": pixel_settings(settings).groups,
        "members": members,
        NETWORK_WEIGHTS: weights,
    }


def load_fusion_data(settings: Settings, folder: Path, members: int, weights: str) -> FusionData:
    """Read the data set."""
    path = folder / DATA
    if not path.is_file():
        raise UserError(
            f"no fusion data set in {path.parent}: generate it first (the same command with "
            f"-fusion -sample_fusion --nactors {members})"
        )
    tensors, header = load_checkpoint(path)
    check_alike(path, header.get("settings", {}), _depends(settings, members, weights), AGAIN)
    return FusionData(tensors["groups"], tensors["targets"])
