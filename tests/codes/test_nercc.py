from __future__ import annotations

from itertools import combinations

import pytest
import torch
from scipy.interpolate import make_smoothing_spline
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.interpolation import first_kind, second_kind
from codedinvnet.codes.method import Given
from codedinvnet.codes.nercc import NeRCC, SplineCode, smoothing_spline_matrix
from codedinvnet.codes.rules import is_systematic
from tests.codes.linear import SHAPE, Linear, images, made, outputs_of, without


def nodes_of(scheme: Scheme) -> Tensor:
    assert isinstance(scheme.code, SplineCode)
    return scheme.code.nodes


POINTS = torch.linspace(-1.2, 1.2, 41, dtype=torch.float64)


def rising(n: int) -> Tensor:
    return first_kind(n).flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("n", [5, 10])
def test_with_smoothing_it_is_scipys_where_scipy_has_one(n: int, smoothing: float) -> None:
    """scipy minimises the sum of squares instead of their mean, so its λ is n times ours."""
    knots = rising(n)
    values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    expected = make_smoothing_spline(knots.numpy(), values.numpy(), lam=n * smoothing)
    inside = POINTS.clamp(knots[0], knots[-1])
    found = smoothing_spline_matrix(inside, knots, smoothing) @ values
    torch.testing.assert_close(
        found, torch.from_numpy(expected(inside.numpy())), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("k", "stragglers"), [(2, 1), (3, 2), (4, 1), (10, 1)])
def test_every_pattern_is_two_splines_of_a_linear_models_outputs(k: int, stragglers: int) -> None:
    classifier = Linear()
    method = made(NeRCC, classifier, k, stragglers=stragglers, smoothing=(1e-3, 1e-2))
    assert not is_systematic(method.rules)
    group = images(k)
    direct = torch.stack([classifier(group[:, i]) for i in range(k)], dim=1).detach()
    outputs = outputs_of(method, group)
    encode = smoothing_spline_matrix(second_kind(k + stragglers), first_kind(k), 1e-3)
    for count in range(stragglers + 1):
        for lost in combinations(range(k + stragglers), count):
            kept = [t for t in range(k + stragglers) if t not in lost]
            decode = smoothing_spline_matrix(first_kind(k), nodes_of(method)[kept], 1e-2)
            expected = torch.einsum("kn,nm,bmc->bkc", decode, encode[kept], direct)
            answers = method.decode(without(outputs, *lost), k)
            found = torch.stack([answers[i] for i in range(k)], dim=1)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9)
    too_few = without(outputs, *range(stragglers + 1))
    assert method.decode(too_few, k) == {}
    assert method.rules.recoverable(frozenset(too_few), k) == frozenset()


class Steps(nn.Module):
    """A classifier with sharp steps, for which smoothing matters."""

    classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        brightness = images.double().mean(dim=(1, 2, 3))
        levels = torch.linspace(0, 1, self.classes, dtype=torch.float64)
        return -self.weight * 100 * (brightness[:, None] - levels).abs()


@pytest.mark.parametrize("stragglers", [0, 1, 2])
def test_tuning_finds_the_best_pair_on_the_groups_it_is_given(stragglers: int) -> None:
    generator = torch.Generator().manual_seed(3)
    group = torch.rand(40, 4, 1, 1, 1, dtype=torch.float64, generator=generator)
    group = group.expand(-1, -1, 2, 4, 4)
    classifier = Steps()
    labels = torch.stack([classifier(group[:, i]).argmax(1) for i in range(4)], dim=1)
    candidates = (0.0, 1e-3, 1.0)

    def accuracy(method: Scheme) -> int:
        outputs = outputs_of(method, group)
        found = [
            torch.stack(
                [a.argmax(1) for a in method.decode(without(outputs, *lost), 4).values()], 1
            )
            for lost in combinations(range(4 + stragglers), stragglers)
        ]
        return sum(int((f == labels).sum()) for f in found)

    def make(encoder: float, decoder: float) -> Scheme:
        return made(NeRCC, classifier, 4, stragglers=stragglers, smoothing=(encoder, decoder))

    given = Given(4, classifier, SHAPE, classifier.classes, stragglers=stragglers)
    chosen = NeRCC().tune(given, group, labels, candidates)
    all_pairs = {(e, d): accuracy(make(e, d)) for e in candidates for d in candidates}
    assert len(set(all_pairs.values())) > 1
    assert all_pairs[tuple(chosen["smoothing"])] == max(all_pairs.values())
