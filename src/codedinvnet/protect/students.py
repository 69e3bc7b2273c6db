"""Small classifiers, by the kind of their inputs, as wide as a cost allows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.models.base import DATATYPES, TensorSpec
from codedinvnet.models.graph import Graph
from codedinvnet.nn.resnet import ResNet
from codedinvnet.protect.images import is_image, layout

Kind: TypeAlias = Literal["images", "vectors", "tokens"]
FINE, COARSE = 16, 112
"""Sides of images: smaller ones keep their resolution, larger ones are averaged down to it."""
MOST_WORDS = 2**18
"""Integers of a larger vocabulary, or below 0, are numbers or times, and no words."""
DEEP = 48
"""From this width on a small network for vectors has two hidden layers."""
SEGMENTS = 8
"""Parts of a sequence whose averages are kept apart: where a token stands matters."""


@dataclass(frozen=True)
class Shape:
    """What a small classifier is made of, as JSON has it.

    Attributes:
        kind: the kind of its inputs.
        width: the width of its layers.
        classes: how many there are.
        inputs: the model's inputs, name, datatype and shape, in their order.
        words: the size of each input's vocabulary, one more than the largest token that was seen.
        quarters: parts of an image's side whose averages are kept apart; where a thing stands
            matters to a model that was not trained with shifted images.
        graph: the served model's own network, as `Graph.described` has it; None: a fresh one.
        size: height and width of the images that this network is given.
    """

    kind: Kind
    width: int
    classes: int
    inputs: tuple[TensorSpec, ...]
    words: tuple[int, ...] = ()
    quarters: int = 2
    graph: Mapping[str, Any] | None = None
    size: tuple[int, int] = (0, 0)

    def build(self) -> Student:
        """Return the untrained network."""
        if self.graph is not None:
            return ShrunkStudent(self)
        networks: Mapping[Kind, type[Student]] = {
            "images": ImageStudent,
            "vectors": VectorStudent,
            "tokens": TokenStudent,
        }
        return networks[self.kind](self)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        inputs = [{**asdict(spec), "shape": list(spec.shape)} for spec in self.inputs]
        return {**asdict(self), "inputs": inputs, "size": list(self.size)}


def shape_of(value: Mapping[str, Any]) -> Shape:
    """Return the shape that `Shape.as_json` described."""
    inputs = tuple(
        TensorSpec(spec["name"], spec["datatype"], tuple(spec["shape"])) for spec in value["inputs"]
    )
    kept = value.get("quarters", 1)  # those of before there was a choice have one
    words = value["words"]  # older ones have one number for all inputs
    words = (words,) * len(inputs) if isinstance(words, int) else tuple(words)
    height, width = value.get("size", (0, 0))
    return Shape(
        value["kind"],
        value["width"],
        value["classes"],
        inputs,
        words,
        kept,
        value.get("graph"),
        (height, width),
    )


def kind_of(inputs: tuple[TensorSpec, ...]) -> Kind:
    """Return the kind of a model's inputs: one image; sequences of integers; or else vectors."""
    if len(inputs) == 1 and is_image(inputs[0]):
        return "images"
    integers = all(DATATYPES[spec.datatype].kind in "iub" for spec in inputs)
    lengths = {spec.shape for spec in inputs}
    return "tokens" if integers and len(lengths) == 1 and len(inputs[0].shape) == 1 else "vectors"


def are_words(arrays: Mapping[str, np.ndarray]) -> bool:
    """Tell whether integers, name -> (N, *shape), may be tokens, and not numbers or times."""
    return min(int(a.min()) for a in arrays.values()) >= 0 and (
        max(words_of(arrays.values())) <= MOST_WORDS
    )


def words_of(arrays: Iterable[np.ndarray]) -> tuple[int, ...]:
    """Return the size of the vocabulary of each of some inputs of integers, (N, *shape)."""
    return tuple(1 + int(array.max()) for array in arrays)


class Student(nn.Module, ABC):
    """A small classifier of a model's inputs.

    Args:
        shape: its kind, sizes and inputs.
    """

    title = "small backup"
    """What its training is called."""
    last = False
    """Whether channels are the last axis of its images."""
    reduced = True
    """Whether it is trained faster in bfloat16, on processors where convolutions are."""
    rates: Mapping[str, float] = {}
    """Its learning rate and weight decay, where they are not those of all parts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def learn_scale(self, batch: Mapping[str, np.ndarray]) -> None:
        """Take the inputs' means and deviations from some of them, name -> (N, *shape)."""

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """Map the inputs (B, *shape), in the model's order, to logits (B, classes)."""


def tensors(shape: Shape, batch: Mapping[str, np.ndarray]) -> list[Tensor]:
    """Return a batch as a student takes it."""
    found = []
    for spec in shape.inputs:
        array = batch[spec.name]
        found.append(torch.from_numpy(np.require(array, requirements=["C", "W"])))
    return found


class ImageStudent(Student):
    """A residual network of one block a stage, at a reduced resolution."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        (spec,) = shape.inputs
        channels, self.last = layout(spec)
        sides = spec.shape[:2] if self.last else spec.shape[1:]
        self.pool = max(1, math.ceil(max(sides) / COARSE))
        side = max(sides) / self.pool
        squeeze = 1 if side < FINE else 2 if side <= 64 else 4
        self.padding = [-math.ceil(s / self.pool) % squeeze for s in sides]
        self.network = ResNet(
            channels, shape.classes, width=shape.width, blocks=(1, 1, 1), squeeze=squeeze
        )
        self.quarters = shape.quarters
        if self.quarters > 1:
            features = self.network.features * self.quarters**2
            self.network.classify = nn.Linear(features, shape.classes)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def learn_scale(self, batch: Mapping[str, np.ndarray]) -> None:
        x = self.first(*tensors(self.shape, batch))
        self.mean = x.mean(dim=(0, 2, 3))[:, None, None]
        self.std = x.std(dim=(0, 2, 3))[:, None, None].clamp_min(1e-6)

    def first(self, images: Tensor) -> Tensor:
        """Return images as floats, channels first."""
        return (images.permute(0, 3, 1, 2) if self.last else images).float()

    def forward(self, *inputs: Tensor) -> Tensor:
        x = (self.first(*inputs) - self.mean) / self.std
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        down, right = self.padding
        x = F.pad(x, (0, right, 0, down)).contiguous(memory_format=torch.channels_last)
        maps = F.adaptive_avg_pool2d(self.network.maps(x), self.quarters)
        logits: Tensor = self.network.classify(maps.flatten(1))
        return logits


class ShrunkStudent(Student):
    """The served model's graph, behind a layer that makes images smaller."""

    title = "the model on smaller images"
    reduced = False  # gradients of depthwise convolutions take twice as long then
    rates: Mapping[str, float] = {"learning_rate": 5e-4, "weight_decay": 0.01}

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        (spec,) = shape.inputs
        _, self.last = layout(spec)
        assert shape.graph is not None
        self.network = Graph(shape.graph)
        height = spec.shape[0 if self.last else 1]
        self.pool = max(1, height // shape.size[0])
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, *inputs: Tensor) -> Tensor:
        x = (inputs[0].permute(0, 3, 1, 2) if self.last else inputs[0]).float()
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        if x.shape[2:] != self.shape.size:
            x = F.interpolate(x, self.shape.size, mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(x.permute(0, 2, 3, 1) if self.last else x)
        return logits


class VectorStudent(Student):
    """An MLP of all inputs, flattened; a missing value (NaN) counts as the mean."""

    reduced = False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        features = sum(math.prod(spec.shape) for spec in shape.inputs)
        width = shape.width
        layers: list[nn.Module] = [nn.Linear(features, width), nn.GELU()]
        if width >= DEEP:
            layers += [nn.Linear(width, width), nn.GELU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, shape.classes))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def learn_scale(self, batch: Mapping[str, np.ndarray]) -> None:
        x = self.flat(*tensors(self.shape, batch))
        known = x.isfinite()
        counts = known.sum(dim=0)
        self.mean = x.masked_fill(~known, 0.0).sum(dim=0) / counts.clamp_min(1)
        squares = (x - self.mean).masked_fill(~known, 0.0).square().sum(dim=0)
        std = (squares / (counts - 1).clamp_min(1)).sqrt()
        self.std = torch.where(std > 1e-6, std, 1.0)  # of a feature that never changes

    def flat(self, *inputs: Tensor) -> Tensor:
        """Return all inputs in one vector, (B, features)."""
        return torch.cat([x.unsqueeze(-1).flatten(1).float() for x in inputs], dim=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = (self.flat(*inputs) - self.mean) / self.std
        x = x.masked_fill(x.isnan(), 0.0).clamp(-10, 10)
        logits: Tensor = self.network(x)
        return logits


class TokenStudent(Student):
    """Embeddings, added over the inputs, and two 1-D convolutions with steps of their half."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width, length = shape.width, shape.inputs[0].shape[0]
        self.embeddings = nn.ModuleList(nn.Embedding(words, width) for words in shape.words)
        kernel = 8 if length >= 256 else 3
        step = max(1, kernel // 2)
        self.layers = nn.Sequential(
            nn.Conv1d(width, 2 * width, kernel, step, kernel // 2),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Conv1d(2 * width, 4 * width, kernel, step, kernel // 2),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
        )
        self.classify = nn.Linear(4 * width * (SEGMENTS + 1), shape.classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        known = zip(self.embeddings, inputs, self.shape.words, strict=True)
        h = torch.stack([table(x.long().clamp(0, n - 1)) for table, x, n in known]).sum(0)
        h = self.layers(h.transpose(1, 2))
        parts = F.adaptive_avg_pool1d(h, SEGMENTS).flatten(1)
        logits: Tensor = self.classify(torch.cat([parts, h.amax(dim=2)], dim=1))
        return logits
