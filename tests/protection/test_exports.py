"""Backups of models as strangers export them: by either exporter, for one query or many."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from codedinvnet.models import open_model
from codedinvnet.protection.folder import export_student
from codedinvnet.protection.inputs import Inputs, split
from codedinvnet.protection.students import SmallerImages, Unfit, graph_of
from codedinvnet.protection.teacher import Teacher, ask

COUNT, SIDE, CLASSES = 215, 64, 4
"""Training inputs are one more than some batches."""
EXPORTS = pytest.mark.nightly(reason="each exports two graphs, which takes ten seconds")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": lambda: models.mobilenet_v3_small(num_classes=CLASSES),
    "shuffled": lambda: Shuffled(),
    "transformer": lambda: Patches(),
}


class Shuffled(nn.Module):
    """Halves of the channels take different ways, and are shuffled, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 16, 3, 4, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.last, self.head = nn.Conv2d(16, 32, 3, 1, 1), nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        whole, halved = self.stem(images).relu().chunk(2, 1)
        h = torch.cat([whole, self.side(halved).relu()], 1)
        queries, channels, height, width = h.shape
        h = h.view(queries, 2, channels // 2, height, width).transpose(1, 2)
        h = self.last(h.reshape(queries, channels, height, width)).relu()
        scores: Tensor = self.head(h.mean((2, 3)))
        return scores


class Patches(nn.Module):
    """A vision transformer with a class token, as most are written: one product for q, k and v."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        h = self.embed(images).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        queries, places, width = h.shape
        qkv = self.qkv(self.first(h)).reshape(queries, places, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        h = h + self.out((weights @ v).transpose(1, 2).reshape(queries, places, width))
        scores: Tensor = self.head((h + self.mlp(self.second(h)))[:, 0])
        return scores


class Spread(nn.Module):
    """A network whose scores are shifted and scaled, so that it gives all classes."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network = network.eval()
        with torch.no_grad():
            scores = network(images)
        self.mean, self.deviation = nn.Buffer(scores.mean(0)), nn.Buffer(scores.std())

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = 3 * (self.network(images) - self.mean) / self.deviation
        return scores


def write(network: nn.Module, path: Path, way: str) -> None:
    """Export a network."""
    more: dict[str, Any] = {"dynamo": False}
    if way == "classic":
        more["dynamic_axes"] = {"images": {0: "n", 2: "h", 3: "w"}, "scores": {0: "n"}}
    elif way == "dynamo":
        more = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "external_data": False}
    example = torch.zeros(2 if way == "dynamo" else 1, 3, SIDE, SIDE)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.eval(), (example,), path, verbose=False, **names, **more)


def taught(name: str, way: str, folder: Path) -> Teacher:
    """Return a network's export with its scores."""
    generator = np.random.default_rng(0)
    images = generator.random((COUNT, 3, 1, 1)) * generator.random((COUNT, 3, SIDE, SIDE))
    images = images.astype(np.float32)
    torch.manual_seed(0)
    write(Spread(NETWORKS[name](), torch.from_numpy(images)), folder / "model.onnx", way)
    told = f"images:FP32:3x{SIDE}x{SIDE}"
    model = open_model(folder / "model.onnx", inputs=(told,) if way == "classic" else ())
    inputs = Inputs({"images": images}, model.signature.inputs)
    return ask(model, inputs, split(COUNT, 0), folder, 5.0, task="classify")


@EXPORTS
@pytest.mark.parametrize("way", ["classic", "dynamo"])
def test_the_models_own_graph_becomes_a_backup(way: str, tmp_path: Path) -> None:
    teacher = taught("mobilenet", way, tmp_path)
    choice = SmallerImages.choose(teacher, SmallerImages.sizes(teacher)[-1])
    student = SmallerImages(teacher, choice).eval()
    batch = teacher.inputs.batch(np.arange(5))
    served = export_student(tmp_path, student.family, student, teacher)
    np.testing.assert_allclose(
        served.run(batch)[teacher.output.name], student.raw(batch), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("transformer", "one query"),
        pytest.param("transformer", "dynamo", marks=EXPORTS),
        pytest.param("shuffled", "one query", marks=EXPORTS),
    ],
)
def test_a_model_of_one_size_of_images_has_none_on_smaller_ones(
    name: str, way: str, tmp_path: Path
) -> None:
    teacher = taught(name, way, tmp_path)
    graph_of(teacher)  # PyTorch computes what the model does
    with pytest.raises(Unfit, match="the model takes images of one size only"):
        SmallerImages.choose(teacher, 0.5)
