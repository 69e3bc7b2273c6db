"""Small networks that can stand in for a served model: one class each, listed in `STUDENTS`.

A class says in which sizes it makes networks, turns a size into a `choice` of plain values, and
builds the untrained network of a choice. The ladder times them. The one of the served model's own
graph starts from its weights: a network that already knows the classes needs far fewer steps than
a fresh one.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.common.errors import one_line
from codedinvnet.models.base import DATATYPES
from codedinvnet.models.graph import Graph, read_graph
from codedinvnet.models.onnx_file import export
from codedinvnet.models.probe import differ
from codedinvnet.nn.resnet import ResNet
from codedinvnet.protection.inputs import image_size, is_image, layout
from codedinvnet.protection.tasks import Classify
from codedinvnet.protection.teacher import Teacher

Kind = Literal["images", "vectors", "tokens", "signals"]
Choice = dict[str, Any]
MOST_WORDS = 2**18
"""Integers from a larger range, or below 0, are numbers and not tokens."""
SAMPLE = 1000
"""Training inputs from which means and deviations are taken; of images a quarter of it."""
FINE, COARSE = 16, 112
"""Images of a smaller side keep their resolution; larger ones are averaged down to COARSE."""
QUARTERS = 2
"""Parts of an image's side that are pooled apart: where a thing stands may matter to the model."""
SEGMENTS = 8
"""Parts of a sequence that are pooled apart, if it has no mask."""
LONG, PLACES = 128, 64
"""From so many numbers in a row on they may be a signal; convolutions leave at most PLACES."""
DEEP = 48
"""From this width on, the network for vectors has two hidden layers."""
WIDTHS = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""ONNX Runtime computes 8 or 16 channels together: 40 of them take as long as 48."""
SIDES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Of smaller images, in the original's."""
SMALLEST = 24
"""Images of a smaller side show too little."""
CLOSE = 1e-2
"""The graph's scores may differ from the model's by this share of the largest one."""
TRIED = 8
"""Training inputs that the graph and masks are checked with."""


class Unfit(Exception):
    """No network of this kind can stand in for the model; the message says why."""


def kind_of(teacher: Teacher) -> Kind:
    """Return what the inputs are: an image, a signal, sequences of tokens, or else vectors."""
    specs = teacher.inputs.specs
    if len(specs) == 1 and is_image(specs[0]):
        return "images"
    integers = all(DATATYPES[spec.datatype].kind in "iub" for spec in specs)
    rows = [spec for spec in specs if len(spec.shape) in (1, 2) and max(spec.shape) >= LONG]
    if len(specs) == len(rows) == 1 and DATATYPES[specs[0].datatype].kind == "f":
        return "signals"
    if not integers or len(specs[0].shape) != 1 or len({spec.shape for spec in specs}) > 1:
        return "vectors"
    arrays = [teacher.inputs.arrays[spec.name] for spec in specs]
    words = min(int(a.min()) for a in arrays) >= 0 and max(int(a.max()) for a in arrays)
    return "tokens" if words and words < MOST_WORDS else "vectors"


class Student(nn.Module, ABC):
    """A small network from a model's inputs, (B, *shape) each, to raw outputs (B, columns).

    Args:
        teacher: the served model with its inputs.
        choice: what `choose` found.
    """

    family: ClassVar[str]
    kinds: ClassVar[Sequence[Kind]]
    """What inputs it takes."""
    reduced: bool = True
    """Whether training may compute in bfloat16."""
    rates: ClassVar[Mapping[str, float]] = {}
    """Learning rate and weight decay, where they differ from the usual ones."""

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__()
        self.specs, self.choice = teacher.inputs.specs, choice
        self.last = is_image(self.specs[0]) and layout(self.specs[0])[1]

    @classmethod
    @abstractmethod
    def sizes(cls, teacher: Teacher) -> Sequence[float]:
        """Return what it is made in, from the quickest to the slowest."""

    @classmethod
    @abstractmethod
    def choose(cls, teacher: Teacher, size: float) -> Choice:
        """Return the network of a size.

        Raises:
            Unfit: if there is none.
        """

    def tensors(self, batch: Mapping[str, np.ndarray]) -> list[Tensor]:
        """Return a batch's tensors in the order of the model's inputs."""
        return [torch.from_numpy(batch[spec.name]) for spec in self.specs]

    def images(self, *inputs: Tensor) -> Tensor:
        """Return the only input's images as floats, channels first."""
        return (inputs[0].permute(0, 3, 1, 2) if self.last else inputs[0]).float()

    def raw(self, batch: Mapping[str, np.ndarray]) -> Tensor:
        """Return the raw outputs (B, columns) of a batch."""
        with torch.inference_mode():
            found: Tensor = self(*self.tensors(batch)).float()
        return found


class FreshStudent(Student):
    """A new network of some width."""

    mean: Tensor
    std: Tensor

    def scale(self, mean: Tensor, std: Tensor) -> None:
        """Keep what inputs are scaled by."""
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @classmethod
    def sizes(cls, teacher: Teacher) -> Sequence[float]:
        return WIDTHS

    @classmethod
    def choose(cls, teacher: Teacher, size: float) -> Choice:
        return {"width": int(size)}


class FreshImages(FreshStudent):
    """Three residual blocks on space-to-depth images."""

    family = "fresh"
    kinds = ("images",)

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        channels, sides = layout(self.specs[0])[0], image_size(self.specs[0])
        self.pool = max(1, math.ceil(max(sides) / COARSE))
        side = max(sides) / self.pool
        squeeze = 1 if side < FINE else 2 if side <= 64 else 4
        self.padding = [-math.ceil(s / self.pool) % squeeze for s in sides]
        self.network = ResNet(
            channels, teacher.task.columns, width=choice["width"], blocks=(1, 1, 1), squeeze=squeeze
        )
        self.network.classify = nn.Linear(self.network.features * QUARTERS**2, teacher.task.columns)
        sample = self.images(*self.tensors(teacher.inputs.batch(teacher.spread(SAMPLE // 4))))
        std, mean = torch.std_mean(sample, dim=(0, 2, 3))
        self.scale(mean[:, None, None], std[:, None, None].clamp_min(1e-6))
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, *inputs: Tensor) -> Tensor:
        x = (self.images(*inputs) - self.mean) / self.std
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        down, right = self.padding
        x = F.pad(x, (0, right, 0, down)).contiguous(memory_format=torch.channels_last)
        maps = F.adaptive_avg_pool2d(self.network.maps(x), QUARTERS)
        logits: Tensor = self.network.classify(maps.flatten(1))
        return logits


class FreshVectors(FreshStudent):
    """An MLP of all inputs, flattened, and of which values are missing (NaN), if any are."""

    family = "mlp"
    kinds = ("vectors", "signals")
    reduced = False

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        x = self.flat(*self.tensors(teacher.inputs.batch(teacher.spread(SAMPLE))))
        x = x.masked_fill(~x.isfinite(), math.nan)
        self.gaps = bool(x.isnan().any())
        mean = x.nanmean(dim=0).nan_to_num()
        std = (x - mean).square().nanmean(dim=0).sqrt()
        self.scale(mean, torch.where(std > 1e-6, std, 1.0))
        width, features = choice["width"], x.shape[1] * (1 + self.gaps)
        layers: list[nn.Module] = [nn.Linear(features, width), nn.GELU()]
        if width >= DEEP:
            layers += [nn.Linear(width, width), nn.GELU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, teacher.task.columns))

    def flat(self, *inputs: Tensor) -> Tensor:
        """Return all inputs in one vector, (B, features)."""
        return torch.cat([x.unsqueeze(-1).flatten(1).float() for x in inputs], dim=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = (self.flat(*inputs) - self.mean) / self.std
        missing = x.isnan()
        x = torch.where(missing, 0.0, x).clamp(-10, 10)
        logits: Tensor = self.network(torch.cat([x, missing.float()], 1) if self.gaps else x)
        return logits


class FreshSequence(FreshStudent):
    """Strided convolutions along a sequence, and what they find in it on average and at most."""

    def build(
        self, teacher: Teacher, before: int, layers: Sequence[tuple[int, int, int]], parts: int
    ) -> None:
        """Add layers, by channels, kernel and stride each, and the head of so many pooled parts."""
        self.layers, self.steps, self.parts = nn.ModuleList(), layers, parts
        for after, kernel, stride in layers:
            convolution = nn.Conv1d(before, after, kernel, stride, kernel // 2)
            self.layers.append(nn.Sequential(convolution, nn.BatchNorm1d(after), nn.ReLU()))
            before = after
        self.head = nn.Linear(before * (parts + 1), teacher.task.columns)

    def scores(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return raw outputs of sequences (B, C, L), of which a mask (B, 1, L) says what counts."""
        for layer, (_, kernel, stride) in zip(self.layers, self.steps, strict=True):
            h = layer(h)
            if mask is not None:
                mask = F.max_pool1d(mask, kernel, stride, kernel // 2)
                h = h * mask
        if mask is None:
            parts = F.adaptive_avg_pool1d(h, self.parts).flatten(1)
        else:
            parts = h.sum(2) / mask.sum(2).clamp_min(1)
        raw: Tensor = self.head(torch.cat([parts, h.amax(dim=2)], dim=1))
        return raw


class FreshTokens(FreshSequence):
    """Embeddings, added over the inputs, and convolutions; what a mask hides has no part in it."""

    family = "convolutions"
    kinds = ("tokens",)

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        width, length = choice["width"], self.specs[0].shape[0]
        hides = masks_of(teacher)
        self.masks = [place for place, spec in enumerate(self.specs) if spec.name in hides]
        self.texts = [place for place, spec in enumerate(self.specs) if spec.name not in hides]
        self.words = [
            1 + int(teacher.inputs.arrays[self.specs[place].name].max()) for place in self.texts
        ]
        self.embeddings = nn.ModuleList(nn.Embedding(words, width) for words in self.words)
        kernel, stride = (8, 4) if length >= 256 else (3, 1)
        layers = [(after, kernel, stride) for after in (2 * width, 4 * width)]
        self.build(teacher, width, layers, 1 if self.masks else SEGMENTS)

    def forward(self, *inputs: Tensor) -> Tensor:
        known = zip(self.embeddings, (inputs[i] for i in self.texts), self.words, strict=True)
        h = torch.stack([table(x.long().clamp(0, n - 1)) for table, x, n in known]).sum(0)
        h, mask = h.transpose(1, 2), None
        if self.masks:
            mask = torch.stack([inputs[i].float() for i in self.masks]).prod(0)[:, None]
            h = h * mask
        return self.scores(h, mask)


class FreshSignals(FreshSequence):
    """Convolutions along the longer axis of a signal."""

    family = "signal"
    kinds = ("signals",)

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        shape, width = self.specs[0].shape, choice["width"]
        self.turned = len(shape) == 2 and shape[0] > shape[1]
        length, channels = max(shape), min(shape) if len(shape) == 2 else 1
        layers: list[tuple[int, int, int]] = []
        while length > PLACES or not layers:
            kernel, stride = (32, 8) if length >= 16 * PLACES else (9, 4 if length > PLACES else 1)
            layers.append((min(2 ** len(layers), 4) * width, kernel, stride))
            length = -(-length // stride)
        self.build(teacher, channels, layers, SEGMENTS)
        x = self.rows(*self.tensors(teacher.inputs.batch(teacher.spread(SAMPLE // 4))))
        std, mean = torch.std_mean(x.nan_to_num(), dim=(0, 2))
        self.scale(mean[:, None], std[:, None].clamp_min(1e-6))

    def rows(self, *inputs: Tensor) -> Tensor:
        """Return signals as (B, C, L)."""
        (x,) = inputs
        x = x.float() if x.ndim == 3 else x.float()[:, None]
        return x.transpose(1, 2) if self.turned else x

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scores(((self.rows(*inputs) - self.mean) / self.std).nan_to_num())


@lru_cache(maxsize=1)
def masks_of(teacher: Teacher) -> frozenset[str]:
    """Return the inputs of zeros and ones whose zeros hide the others' tokens from the model.

    Where one is 0, the tokens of another query in their place change no answer.
    """
    inputs, rows = teacher.inputs, teacher.spread(TRIED)
    batch, found = inputs.batch(rows), set()
    others = inputs.batch(np.roll(rows, 1))
    for name, array in inputs.arrays.items():
        if len(inputs.specs) < 2 or set(np.unique(array[rows])) != {0, 1}:
            continue
        hidden = batch[name] == 0
        changed = {
            each: values if each == name else np.where(hidden, others[each], values)
            for each, values in batch.items()
        }
        moved = any((changed[each] != batch[each]).any() for each in batch)
        if moved and not differ(teacher.run(batch), teacher.run(changed), CLOSE):
            found.add(name)
    return frozenset(found)


def graph_of(teacher: Teacher) -> Graph:
    """Return the served model's graph up to its logits; Unfit if it can't be trained and served."""
    found = _graph_of(teacher)
    if isinstance(found, Unfit):
        raise found
    return found


@lru_cache(maxsize=1)
def _graph_of(teacher: Teacher) -> Graph | Unfit:
    if not isinstance(teacher.task, Classify):
        return Unfit("only a classifier's own graph says how sure an answer is")
    likely = teacher.task.kind == "probabilities"
    batch = teacher.inputs.batch(teacher.spread(TRIED))
    try:
        graph = read_graph(teacher.onnx, teacher.output.name, logits=likely).eval()
        with torch.inference_mode():
            scores = graph(sample(teacher, TRIED))
        export(graph, {"x": sample(teacher, TRIED)}, ["scores"])  # or it is trained for nothing
    except Exception as error:  # PyTorch has many for what does not fit
        return Unfit(f"PyTorch cannot compute its graph: {one_line(error)}")
    found = (scores.softmax(1) if likely else scores).numpy()
    wanted = teacher.run(batch)
    if found.shape != wanted.shape or differ(wanted, found, CLOSE):
        return Unfit("PyTorch computes other scores from its graph")
    return graph


def sample(teacher: Teacher, count: int) -> Tensor:
    """Return some training images as floats."""
    (array,) = teacher.inputs.batch(teacher.spread(count)).values()
    return torch.from_numpy(array).float()


class SmallerImages(Student):
    """The served model's own graph on smaller images."""

    family = "smaller-images"
    kinds = ("images",)
    rates: ClassVar[Mapping[str, float]] = {"learning_rate": 5e-4, "weight_decay": 0.01}

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        self.size = choice["height"], choice["width"]
        self.pool = max(1, image_size(self.specs[0])[0] // self.size[0])
        self.network = copy.deepcopy(graph_of(teacher))
        # In bfloat16 the gradients of depthwise convolutions take twice as long.
        nodes = self.network.described["nodes"]
        self.reduced = all(options.get("group", 1) == 1 for *_, options in nodes)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.images(*inputs)
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(x.permute(0, 2, 3, 1) if self.last else x)
        return logits

    @classmethod
    def sizes(cls, teacher: Teacher) -> Sequence[float]:
        least = SMALLEST / min(image_size(teacher.inputs.specs[0]))
        if not (found := [side for side in SIDES if side >= least]):
            raise Unfit(f"images would have fewer than {SMALLEST} pixels a side")
        return found

    @classmethod
    def choose(cls, teacher: Teacher, size: float) -> Choice:
        height, width = image_size(teacher.inputs.specs[0])
        choice = {"height": max(1, round(size * height)), "width": max(1, round(size * width))}
        try:
            cls(teacher, choice).eval().raw(teacher.inputs.batch(np.arange(1)))
        except (RuntimeError, IndexError, ValueError) as error:
            raise Unfit("the model takes images of one size only") from error
        return choice


STUDENTS: Mapping[str, type[Student]] = {
    student.family: student
    for student in (FreshImages, FreshVectors, FreshTokens, FreshSignals, SmallerImages)
}
"""The ladder's candidates."""
