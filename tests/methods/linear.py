"""A linear classifier, with which every code is exact, and what the methods' tests share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from codedinvnet.methods import CodedMethod

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


def images(size: int, batch: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(batch, size, *SHAPE, dtype=torch.float64, generator=generator)


def outputs_of(method: CodedMethod, group: Tensor) -> dict[int, Tensor]:
    tasks = method.tasks(group.shape[1])
    return {task: method.compute(task, group[:, list(needs)]) for task, needs in tasks.items()}


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
