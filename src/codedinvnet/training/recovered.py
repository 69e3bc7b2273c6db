"""Recovered accuracy on the validation split, as trainings watch it."""

from __future__ import annotations

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.invnet import own_code
from codedinvnet.codes.rules import SERVED
from codedinvnet.evaluation.erase import Queries, erase, single_losses
from codedinvnet.models.coded import CodedModel
from codedinvnet.models.network import embedding_of

BATCH = 250


@torch.no_grad()
def embed_all(model: CodedModel, images: Tensor) -> Tensor:
    """Embed images (N, C, H, W) in batches, as (N, *latent_shape)."""
    return torch.cat([model.embed(part) for part in images.split(BATCH)])


def coded_scheme(model: CodedModel, k: int) -> Scheme:
    """Return the scheme of a model's own code, which shares its weights."""
    models = {SERVED: embedding_of(model)}
    return Scheme("validation", own_code(model, k), models, model.settings.image_shape)


def recovered_accuracy(scheme: Scheme, source: Queries, own: Tensor) -> float:
    """Return the accuracy of decoded answers, each query erased once in one fixed grouping.

    Args:
        scheme: a systematic code for groups of k, its networks in evaluation mode.
        source: the queries.
        own: the outputs (N, n) of the queries' own tasks, on the processor.
    """
    k = scheme.rules.k
    frame = erase(scheme, source, single_losses(k), k=k, seed=k, own=own, progress=False)
    return float((frame["prediction"] == frame["label"]).mean())
