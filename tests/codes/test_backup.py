from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.rules import is_systematic
from tests.codes.linear import Linear, images, made, members_of, outputs_of, without

K = 4


@pytest.mark.parametrize("size", range(1, K + 1))
def test_every_erasure_pattern_is_answered_by_the_backup(size: int) -> None:
    served, backup = Linear(seed=0), Linear(seed=1)
    method = made(SmallBackup, served, K, part=backup)
    assert (method.rules.r, method.rules.fixed_size, is_systematic(method.rules)) == (
        1,
        False,
        True,
    )
    assert members_of(method, size) == {**{i: (i,) for i in range(size)}, K: tuple(range(size))}
    group = images(size)
    outputs = outputs_of(method, group)
    assert outputs[K].shape == (5, 3 * size)
    tasks = list(outputs)
    for lost in chain.from_iterable(combinations(tasks, n) for n in range(len(tasks) + 1)):
        rest = without(outputs, *lost)
        answers = method.decode(rest, size)
        own = {i for i in range(size) if i not in lost}
        expected = own if K in lost else set(range(size))
        assert set(answers) == expected == method.rules.recoverable(frozenset(rest), size)
        for member in expected:
            with torch.no_grad():
                right = (served if member in own else backup)(group[:, member])
            torch.testing.assert_close(answers[member], right)


def test_residual_is_the_largest_distance_between_the_two_classifiers() -> None:
    served, backup = Linear(seed=0), Linear(seed=1)
    method = made(SmallBackup, served, K, part=backup)
    group = images(K)
    with torch.no_grad():
        both = [
            torch.stack([network(group[:, i]) for i in range(K)]) for network in (served, backup)
        ]
    expected = (both[0] - both[1]).square().mean(2).sqrt().amax(0)
    residual = method.residual(outputs_of(method, group), K)
    assert residual is not None
    torch.testing.assert_close(residual, expected)


def test_a_worker_holds_both() -> None:
    assert made(SmallBackup, Linear(), K, part=Linear()).parameters == 2 * (32 * 3 + 3)
