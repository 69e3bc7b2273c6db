"""Recovered accuracy on the validation split, as the fusion stages watch it while they train."""

from __future__ import annotations

import torch
from torch import Tensor

from codedinvnet.data import random_groups
from codedinvnet.models.coded import CodedModel, decode_each

BATCH = 250


@torch.no_grad()
def embed_all(model: CodedModel, images: Tensor) -> Tensor:
    """Embed images (N, C, H, W) in batches, as (N, *latent_shape)."""
    return torch.cat([model.embed(part) for part in images.split(BATCH)])


@torch.no_grad()
def recovered_accuracy(
    model: CodedModel, images: Tensor, labels: Tensor, latents: Tensor, members: int
) -> float:
    """Return the accuracy of decoded answers, each image erased once in one fixed grouping.

    Args:
        model: the model, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,).
        latents: f of the images, (N, *latent_shape).
        members: k.
    """
    groups = random_groups(len(images), members, torch.Generator().manual_seed(members))
    correct = 0
    for rows, counted in zip(groups.members.split(BATCH), groups.counted.split(BATCH), strict=True):
        parity = model.encode(images[rows])
        decoded = decode_each(parity.latent, latents[rows])
        logits = model.recover(decoded.flatten(0, 1), parity.side.flatten(0, 1), members)
        hits = logits.argmax(1) == labels[rows.flatten()]
        correct += int(hits[counted.flatten().to(hits.device)].sum())
    return correct / len(images)
