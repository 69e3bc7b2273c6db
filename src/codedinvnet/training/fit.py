"""`codedinvnet.fit`: train a network, its encoder or a rival's part in memory, without files."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.invnet import own_scheme
from codedinvnet.codes.method import given_of
from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.common.config import RecoveryFusionSettings, TrainSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageRows, ImageSource, split_indices
from codedinvnet.models.coded import CodedModel
from codedinvnet.training.loop import train_stage
from codedinvnet.training.network import NetworkStage, fit_network
from codedinvnet.training.part import TrainingData, all_logits, train_part
from codedinvnet.training.recovery import phases


def fit(
    method: str,
    model: CodedModel,
    images: ImageSource,
    budget: Any = None,
    *,
    k: int = 10,
    network: TrainSettings | None = None,
    validation: int | None = None,
    seed: int = 0,
) -> Scheme:
    """Train a model's network, and what a method needs around it, and return the method's scheme.

    Args:
        method: its name, or `FILE.py:CLASS`.
        model: f, g and E, which are trained in place and are in evaluation mode afterwards.
        images: what to train on, those included by which epochs are chosen.
        budget: how to train what the method needs: `RecoveryFusionSettings` for the model's own E
            (`coded-invnet`), whose joint epochs train f and g, too, and `PartSettings` for a small
            backup or a parity model; None for what needs no training.
        k: queries in a group.
        network: how to train f and g before; None: they stay.
        validation: images by which epochs are chosen; None: a tenth.
        seed: of everything random.

    Raises:
        UserError: if the method needs another budget, or the images are too few.
    """
    found = find_method(method)
    if isinstance(budget, RecoveryFusionSettings) != (found.name == OURS and budget is not None):
        raise UserError(f"{found.name} is not trained by {type(budget).__name__}")
    if found.part and not isinstance(budget, found.budget):
        raise UserError(f"{found.name} is trained by a budget, {found.budget.__name__}")
    aside = len(images) // 10 if validation is None else validation
    rows, held = split_indices(len(images), aside, seed)
    train = ImageRows(images, rows, "the training images")
    held_out = ImageRows(images, held, "the validation images")
    options = network or TrainSettings(epochs=1)
    if network is not None:
        torch.manual_seed(seed)
        fit_network(NetworkStage(model, network, train, held_out), seed=seed)
    if isinstance(budget, RecoveryFusionSettings):
        schemes = {size: own_scheme(model, size) for size in sorted({2, budget.members})}
        for stage, epochs in phases(budget, options, train, held_out, model, schemes):
            train_stage(stage, epochs=epochs, seed=seed)
    model.eval().requires_grad_(False)
    given = given_of(model, k)
    if found.part:
        teacher = given

        @cache
        def logits(name: str) -> Tensor:
            source = train if name == "train" else held_out
            return all_logits(teacher.classifier, source, description="the model's answers")

        made_with = {"k": k, **found.made_with(given, budget)}
        device = first_tensor(model).device
        data = TrainingData(train, held_out, logits, options, seed, device, made_with)
        given = replace(given, part=train_part(found, given, data, budget).requires_grad_(False))
    return found.build(given)
