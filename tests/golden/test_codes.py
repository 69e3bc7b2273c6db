"""Codes that need no training decode fixed outputs to the same numbers as ever."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.method import Given
from codedinvnet.codes.registry import find_method

K, SHAPE = 4, (1, 2, 2)


class Curved(nn.Module):
    """Images (B, 1, 2, 2) to three logits that no code decodes exactly."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.double().flatten(1)
        return torch.stack([x.sum(1), x.square().sum(1), (3 * x[:, 0]).sin()], dim=1)


def decoded(method: str, stragglers: int, lost: tuple[int, ...]) -> list[float]:
    """Return the sum over members of (i + 1) times their logits, as the outputs left give them."""
    chosen = {"smoothing": (1e-4, 1e-3)} if method == "nercc" else {}
    part = Curved() if method == "parm" else None
    given = Given(K, Curved(), SHAPE, 3, stragglers=stragglers, part=part, chosen=chosen)
    scheme = find_method(method).build(given)
    group = torch.arange(K * 4, dtype=torch.float64).mul(7).remainder(16).div(16)
    group = group.view(1, K, *SHAPE)
    outputs = {
        task: scheme.compute(task, group[:, list(spec.members)]).output
        for task, spec in scheme.rules.tasks(K).items()
        if task not in lost
    }
    answers = scheme.decode(outputs, K)
    assert set(answers) == set(range(K))
    total = torch.stack([(i + 1) * answers[i][0] for i in range(K)]).sum(0)
    return [float(value) for value in total]


@pytest.mark.parametrize(
    ("method", "stragglers", "lost", "expected"),
    [
        ("replication", 1, (1,), [19.25, 12.296875, 7.275186394]),
        ("replication", 1, (0, 2, 7), [19.25, 12.296875, 7.275186394]),
        ("parm", 1, (0,), [13.625, 8.3515625, 5.720247044]),
        ("parm", 1, (3,), [-3.25, -3.484375, 1.055428996]),
        ("approxifer", 1, (0,), [19.30888305, 12.21958839, 6.750644424]),
        ("approxifer", 1, (2,), [20.7968848, 13.17177191, 8.655021118]),
        ("approxifer", 1, (4,), [27.0287334, 19.17830657, 11.23056341]),
        ("approxifer", 2, (1, 4), [18.53222459, 11.32322295, 5.432620076]),
        ("nercc", 1, (0,), [19.6230539, 12.26283825, 7.739914615]),
        ("nercc", 1, (2,), [20.40868251, 12.91252868, 8.133569737]),
        ("nercc", 2, (1, 4), [18.64470574, 11.0008852, 6.887568639]),
    ],
)
def test_decoded_answers_are_the_same_numbers(
    method: str, stragglers: int, lost: tuple[int, ...], expected: list[float]
) -> None:
    assert decoded(method, stragglers, lost) == pytest.approx(expected, rel=1e-7)
