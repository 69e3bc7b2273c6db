"""A linear classifier, with which every code is exact; a tiny model; what the tests share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.method import Given, Method
from codedinvnet.common.config import EncoderSettings, NetworkSettings
from codedinvnet.models.base import Model
from codedinvnet.models.coded import CodedModel, ModelSettings, build_model
from codedinvnet.models.network import classifier_of
from codedinvnet.serving.workers.computing import scheme_of

CLASSES = 3
SHAPE = (2, 4, 4)


class Linear(nn.Module):
    """Images (B, 2, 4, 4) to 3 logits, times a factor."""

    def __init__(self, factor: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(32, CLASSES).double()
        self.factor = factor
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        logits: Tensor = self.factor * self.layer(images.double().flatten(1))
        return logits


def tiny_model() -> CodedModel:
    """Return an untrained model of 64-bit floats for 8×8 images, with an E that does something."""
    torch.manual_seed(0)
    model = build_model(
        ModelSettings(
            image_shape=(1, 8, 8),
            padding=0,
            classes=("a", "b", "c"),
            network=NetworkSettings(blocks=(1, 1), strides=(1, 2), hidden=(8, 8)),
            encoder=EncoderSettings(kind="lean", width=4),
        )
    )
    nn.init.normal_(model.encoder.get_parameter("merge1.weight"), std=0.2)
    return model.double().eval()


def images(size: int, batch: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(batch, size, *SHAPE, dtype=torch.float64, generator=generator)


def made(
    kind: type[Method],
    classifier: nn.Module,
    k: int,
    *,
    stragglers: int = 1,
    part: nn.Module | None = None,
    classes: int | None = None,
    **chosen: Any,
) -> Scheme:
    """Return the scheme of a method around a classifier of SHAPE, and CLASSES or its own."""
    if classes is None:
        classes = int(getattr(classifier, "classes", CLASSES))
    given = Given(k, classifier, SHAPE, classes, stragglers=stragglers, part=part, chosen=chosen)
    return kind().build(given)


def around(kind: type[Method], model: CodedModel, k: int) -> Scheme:
    """Return the scheme of a method around a coded model."""
    shape, classes = model.image_shape, len(model.classes)
    return kind().build(Given(k, classifier_of(model), shape, classes, model))


def members_of(scheme: Scheme, size: int) -> dict[int, tuple[int, ...]]:
    return {task: spec.members for task, spec in scheme.rules.tasks(size).items()}


def computed(scheme: Scheme, task: int, queries: Tensor) -> Tensor:
    return scheme.compute(task, queries).output


def outputs_of(scheme: Scheme, group: Tensor) -> dict[int, Tensor]:
    needs = members_of(scheme, group.shape[1])
    return {task: computed(scheme, task, group[:, list(own)]) for task, own in needs.items()}


def without(outputs: Mapping[int, Tensor], *tasks: int) -> dict[int, Tensor]:
    return {task: output for task, output in outputs.items() if task not in tasks}


def assert_answers(
    answers: Mapping[int, Tensor], classifier: nn.Module, group: Tensor, members: set[int]
) -> None:
    """Check that exactly these members are answered, with the classifier's logits."""
    assert set(answers) == members
    with torch.no_grad():
        for member in members:
            expected = classifier(group[:, member])
            torch.testing.assert_close(answers[member], expected, rtol=0.0, atol=1e-9)


def decodings(model: Model, method: str, group: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the answers for a group, (k, classes), for each set of stragglers that the code bears.

    Args:
        model: a classifier of one input.
        method: as `find_method` takes it.
        group: the k members' inputs, (k, ...).
    """
    k = len(group)
    scheme = scheme_of(model, method, k)
    with torch.inference_mode():
        outputs = outputs_of(scheme, torch.from_numpy(group)[None])
        for count in range(2):
            for lost in combinations(outputs, count):
                answers = scheme.decode(without(outputs, *lost), k)
                yield torch.cat([answers[i] for i in range(k)]).numpy()


def assert_is_decoded(found: np.ndarray, model: Model, method: str, group: np.ndarray) -> None:
    """Check that a group's answers are what the code makes of some stragglers' absence."""
    apart = [float(np.abs(found - told).max()) for told in decodings(model, method, group)]
    assert min(apart) < 1e-4, apart
