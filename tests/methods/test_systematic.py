from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch

from codedinvnet.classifier import ImageClassifier
from codedinvnet.errors import UserError
from codedinvnet.methods import CodedMethod, Replication, Uncoded
from codedinvnet.serving.group import is_systematic
from tests.methods.linear import Linear, assert_answers, images, outputs_of, without

K = 4
SIZES = range(1, K + 1)


@pytest.fixture(params=[Uncoded, Replication])
def method(request: pytest.FixtureRequest) -> CodedMethod:
    made: CodedMethod = request.param(Linear(), K)
    return made


def test_data_tasks_are_direct_answers(method: CodedMethod) -> None:
    assert is_systematic(method)
    group = images(K)
    for i in range(K):
        output = method.compute(i, group[:, i : i + 1])
        direct = method.direct(output)
        assert direct is not None
        assert_answers({i: direct}, Linear(), group, {i})
        assert output.is_inference()


@pytest.mark.parametrize("size", SIZES)
def test_every_erasure_pattern_without_a_code(size: int) -> None:
    method = Uncoded(Linear(), K)
    assert method.r == 0
    assert method.tasks(size) == {i: (i,) for i in range(size)}
    group = images(size)
    outputs = outputs_of(method, group)
    for lost in chain.from_iterable(combinations(range(size), n) for n in range(size + 1)):
        rest = without(outputs, *lost)
        left = set(range(size)) - set(lost)
        assert method.recoverable(frozenset(rest), size) == left
        assert_answers(method.decode(rest, size), Linear(), group, left)
    assert method.residual(outputs, size) is None


@pytest.mark.parametrize("size", SIZES)
def test_every_erasure_pattern_of_replication(size: int) -> None:
    method = Replication(Linear(), K)
    assert method.r == K
    assert method.tasks(size) == {
        **{i: (i,) for i in range(size)},
        **{K + i: (i,) for i in range(size)},
    }
    group = images(size)
    outputs = outputs_of(method, group)
    tasks = list(outputs)
    for lost in chain.from_iterable(combinations(tasks, n) for n in range(len(tasks) + 1)):
        rest = without(outputs, *lost)
        left = {i for i in range(size) if not {i, K + i} <= set(lost)}
        assert method.recoverable(frozenset(rest), size) == left
        assert_answers(method.decode(rest, size), Linear(), group, left)


def test_a_corrupt_copy_shows_up_in_the_residual() -> None:
    method = Replication(Linear(), K)
    outputs = outputs_of(method, images(K))
    residual = method.residual(outputs, K)
    assert residual is not None
    assert float(residual.max()) < 1e-12
    corrupt = {**outputs, K + 1: outputs[K + 1].clone()}
    corrupt[K + 1][2] += 0.5
    residual = method.residual(corrupt, K)
    assert residual is not None
    assert residual.tolist() == pytest.approx([0, 0, 0.5, 0, 0], abs=1e-9)
    assert method.residual(without(outputs, 0), K) is None


def test_parameters_are_those_a_worker_holds(method: CodedMethod) -> None:
    assert method.parameters == 32 * 3 + 3


@pytest.mark.parametrize("size", [-1, 0, K + 1])
def test_other_sizes_are_refused(method: CodedMethod, size: int) -> None:
    with pytest.raises(ValueError, match=f"has 1 to {K} members, got {size}"):
        method.tasks(size)


@pytest.mark.parametrize("k", [-1, 0, 1])
@pytest.mark.parametrize("kind", [Uncoded, Replication])
def test_k_below_two_is_the_users_error(kind: type[Uncoded], k: int) -> None:
    with pytest.raises(UserError, match=f"k must be at least 2, got {k}"):
        kind(Linear(), k)


def test_uncoded_has_no_other_tasks() -> None:
    method = Uncoded(Linear(), K)
    with pytest.raises(ValueError, match=f"no task {K}"):
        method.compute(K, images(1))
    with pytest.raises(ValueError, match="cannot make up for member 1"):
        method.decode_missing(1, {}, K)


def test_bytes_are_classified_like_the_floats_they_stand_for() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2 * 6 * 6, 3))
    method = Uncoded(ImageClassifier(network, padding=1), K)
    group = torch.randint(0, 256, (2, 1, 2, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(method.compute(0, group), method.compute(0, group / 255))
