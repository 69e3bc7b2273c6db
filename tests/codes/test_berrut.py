from __future__ import annotations

from itertools import combinations

import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.berrut import ApproxIFER, BerrutCode, berrut_matrix
from codedinvnet.codes.interpolation import first_kind, second_kind
from codedinvnet.codes.rules import is_systematic
from tests.codes.linear import Linear, images, made, outputs_of, without


def code_of(scheme: Scheme) -> BerrutCode:
    assert isinstance(scheme.code, BerrutCode)
    return scheme.code


def berrut(z: float, nodes: list[float], values: list[float]) -> float:
    """Berrut's formula as it is written, away from the nodes."""
    terms = [(1.0 - 2.0 * (rank % 2)) / (z - node) for rank, node in enumerate(nodes)]
    weighted = sum(term * value for term, value in zip(terms, values, strict=True))
    return weighted / sum(terms)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_the_matrix_is_the_formula(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    nodes = torch.rand(n, dtype=torch.float64, generator=generator).sort().values
    values = torch.rand(n, dtype=torch.float64, generator=generator)
    points = torch.linspace(-1.3, 1.7, 11, dtype=torch.float64)
    found = berrut_matrix(points, nodes) @ values
    expected = [berrut(z, nodes.tolist(), values.tolist()) for z in points.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_at_a_node_the_interpolant_is_the_nodes_value(n: int) -> None:
    nodes = second_kind(n)
    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(berrut_matrix(nodes, nodes), identity, rtol=0.0, atol=0.0)
    beside = berrut_matrix(nodes + 1e-9, nodes)
    torch.testing.assert_close(beside, identity, rtol=0.0, atol=1e-6)


def test_signs_follow_the_rank_among_the_nodes_that_are_there() -> None:
    """With the index among all nodes, signs would repeat and the interpolant have poles."""
    nodes = second_kind(6)
    kept = nodes[[0, 1, 3, 4, 5]]
    points = torch.linspace(-0.99, 0.99, 400, dtype=torch.float64)
    assert float(berrut_matrix(points, kept).abs().sum(1).max()) < 10
    shuffled = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        berrut_matrix(points, kept[shuffled]), berrut_matrix(points, kept)[:, shuffled]
    )


@pytest.mark.parametrize(("k", "stragglers"), [(2, 1), (3, 1), (4, 1), (3, 3), (6, 2), (10, 1)])
def test_every_pattern_is_the_interpolant_of_a_linear_models_outputs(
    k: int, stragglers: int
) -> None:
    """A linear model of a mixture is the mixture of its outputs: two matrix products."""
    classifier = Linear()
    method = made(ApproxIFER, classifier, k, stragglers=stragglers)
    assert not is_systematic(method.rules)
    group = images(k)
    direct = torch.stack([classifier(group[:, i]) for i in range(k)], dim=1).detach()
    outputs = outputs_of(method, group)
    for count in range(stragglers + 2):
        for lost in combinations(range(k + stragglers), count):
            rest = without(outputs, *lost)
            answers = method.decode(rest, k)
            if count > stragglers:
                assert answers == {}
                assert method.rules.recoverable(frozenset(rest), k) == frozenset()
                continue
            assert set(answers) == set(range(k)) == method.rules.recoverable(frozenset(rest), k)
            kept = [t for t in range(k + stragglers) if t not in lost]
            encode = berrut_matrix(code_of(method).nodes[kept], first_kind(k))
            decode = berrut_matrix(first_kind(k), code_of(method).nodes[kept])
            expected = torch.einsum("kn,nm,bmc->bkc", decode, encode, direct)
            found = torch.stack([answers[i] for i in range(k)], dim=1)
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-9)
