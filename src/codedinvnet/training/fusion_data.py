"""Stage 2 of the paper: the fusion data set, groups of images with f⁻¹(mean z) as the target."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codedinvnet.common.config import PixelFusionSettings, Settings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.data import ImageSource, settings_split
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from codedinvnet.models.coded import Network, invertible, prepare
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
ERROR = "largest_latent_error"
"""In a shard's header and in the report: the largest difference between f(target) and mean z."""
SECONDS = "seconds"
"""Likewise: what the inversions took."""


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
    shard_batches: int,
    device: torch.device,
    resume: bool,
) -> dict[str, Any]:
    """Generate the fusion data set in `folder/data`, a shard at a time.

    A shard is written whole; with `resume`, shards that are there already are kept.

    Returns:
        What is there, the largest difference between f(target) and mean z in it, and the seconds
        that its shards took, whenever they were made.
    """
    fusion = pixel_settings(settings)
    network, _, header = load_trained_network(settings, network_folder, device)
    check_network_images(source, header)
    settings = as_trained(settings, network_folder, header)
    fold(network)
    train, _ = settings_split(settings, source)
    generator = torch.Generator().manual_seed(settings.seed + members)
    groups = draw_groups(train, fusion.groups, members, generator)
    stamp = _stamp(settings, members, header[NETWORK_WEIGHTS])
    per_shard = shard_batches * INVERSION_BATCH
    written: set[Path] = set()
    worst, seconds = 0.0, 0.0
    with Progress(total=fusion.groups, desc="fusion data", unit="group", dynamic_ncols=True) as bar:
        for number, shard in enumerate(groups.split(per_shard)):
            path = folder / "data" / f"train-{number:05d}.safetensors"
            written.add(path)
            made = _current(path, stamp, shard) if resume else None
            if made is None:
                began = time.monotonic()
                targets, error = invert_means(
                    network, source, shard, padding=settings.data.padding, bar=bar
                )
                made = {ERROR: error, SECONDS: round(time.monotonic() - began, 1)}
                save_checkpoint(
                    path, {"groups": shard, "targets": targets}, {"settings": stamp, **made}
                )
            else:
                bar.update(len(shard))
            worst, seconds = max(worst, made[ERROR]), seconds + made[SECONDS]
    for path in (folder / "data").glob("*.safetensors"):
        if path not in written:  # left by an earlier data set of more shards
            path.unlink()
    return {
        "groups": fusion.groups,
        "members": members,
        "shards": len(written),
        ERROR: worst,
        SECONDS: round(seconds, 1),
    }


def invert_means(
    f: Network, source: ImageSource, groups: Tensor, *, padding: int, bar: Progress
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


def _current(path: Path, stamp: dict[str, Any], groups: Tensor) -> dict[str, float] | None:
    """Return the latent error and the seconds of a shard; None if it must be made."""
    if not path.is_file():
        return None
    try:
        tensors, header = load_checkpoint(path)
    except UserError:
        return None
    same = not differing_keys(header.get("settings", {}), stamp)
    if not (same and torch.equal(tensors["groups"], groups)):
        return None
    return {key: header[key] for key in (ERROR, SECONDS)}


def _stamp(settings: Settings, members: int, weights: str) -> dict[str, Any]:
    """Return what a shard depends on."""
    return {
        **network_settings(settings),
        "groups": pixel_settings(settings).groups,
        "members": members,
        NETWORK_WEIGHTS: weights,
    }


def load_fusion_data(settings: Settings, folder: Path, members: int, weights: str) -> FusionData:
    """Read all shards."""
    fusion = pixel_settings(settings)
    stamp = _stamp(settings, members, weights)
    paths = sorted((folder / "data").glob("train-*.safetensors"))
    if not paths:
        raise UserError(
            f"no fusion data set in {folder / 'data'}: generate it first (the same command with "
            f"-fusion -sample_fusion --nactors {members})"
        )
    groups, targets = [], []
    for path in paths:
        tensors, header = load_checkpoint(path)
        check_alike(path, header.get("settings", {}), stamp, "make it again")
        groups.append(tensors["groups"])
        targets.append(tensors["targets"])
    data = FusionData(torch.cat(groups), torch.cat(targets))
    if len(data.groups) != fusion.groups:
        raise UserError(
            f"{folder / 'data'} holds {len(data.groups)} of {fusion.groups} groups: "
            "finish it (main.py -fusion -sample_fusion --resume 1)"
        )
    return data
