from __future__ import annotations

from itertools import chain, combinations

import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.plain import Plain, Replication
from codedinvnet.codes.rules import is_systematic
from tests.codes.linear import (
    Linear,
    assert_answers,
    computed,
    images,
    made,
    members_of,
    outputs_of,
    without,
)

K = 4
SIZES = range(1, K + 1)


@pytest.fixture(params=[Plain, Replication])
def method(request: pytest.FixtureRequest) -> Scheme:
    return made(request.param, Linear(), K)


def test_data_tasks_are_direct_answers(method: Scheme) -> None:
    assert is_systematic(method.rules)
    group = images(K)
    for i in range(K):
        output = computed(method, i, group[:, i : i + 1])
        direct = method.direct(output)
        assert direct is not None
        assert_answers({i: direct}, Linear(), group, {i})
        assert output.is_inference()


@pytest.mark.parametrize("size", SIZES)
def test_every_erasure_pattern_without_a_code(size: int) -> None:
    method = made(Plain, Linear(), K)
    assert method.rules.r == 0
    assert members_of(method, size) == {i: (i,) for i in range(size)}
    group = images(size)
    outputs = outputs_of(method, group)
    for lost in chain.from_iterable(combinations(range(size), n) for n in range(size + 1)):
        rest = without(outputs, *lost)
        left = set(range(size)) - set(lost)
        assert method.rules.recoverable(frozenset(rest), size) == left
        assert_answers(method.decode(rest, size), Linear(), group, left)


@pytest.mark.parametrize("size", SIZES)
def test_every_erasure_pattern_of_replication(size: int) -> None:
    method = made(Replication, Linear(), K)
    assert method.rules.r == K
    assert members_of(method, size) == {
        **{i: (i,) for i in range(size)},
        **{K + i: (i,) for i in range(size)},
    }
    group = images(size)
    outputs = outputs_of(method, group)
    tasks = list(outputs)
    for lost in chain.from_iterable(combinations(tasks, n) for n in range(len(tasks) + 1)):
        rest = without(outputs, *lost)
        left = {i for i in range(size) if not {i, K + i} <= set(lost)}
        assert method.rules.recoverable(frozenset(rest), size) == left
        assert_answers(method.decode(rest, size), Linear(), group, left)
