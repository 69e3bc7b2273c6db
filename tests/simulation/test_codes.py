from __future__ import annotations

import itertools

import numpy as np
import pytest

from codedinvnet.methods import CodedInvNet, SmallBackup
from codedinvnet.simulation.codes import Backup, ErasureCode


def subsets(tasks: list[int]) -> list[frozenset[int]]:
    return [
        frozenset(chosen)
        for n in range(len(tasks) + 1)
        for chosen in itertools.combinations(tasks, n)
    ]


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("keeps_apart", [False, True])
def test_one_parity_determines_what_coded_invnet_decodes(keeps_apart: bool, k: int) -> None:
    method = CodedInvNet.__new__(CodedInvNet)  # its rules need no network
    method.k, method.keeps_apart = k, keeps_apart
    code = Backup(k) if keeps_apart else ErasureCode(k)
    for size in range(1, k + 1):
        assert code.tasks(size) == method.tasks(size)
        for available in subsets(list(code.tasks(size))):
            assert code.recoverable(available, size) == method.recoverable(available, size)
    for size in (0, k + 1):
        with pytest.raises(ValueError, match="a group has 1 to"):
            code.tasks(size)


@pytest.mark.parametrize("k", [2, 4])
def test_a_backup_answers_for_everybody_as_the_small_backup_does(k: int) -> None:
    method = SmallBackup.__new__(SmallBackup)
    method.k = k
    code = Backup(k)
    for size in range(1, k + 1):
        assert code.tasks(size) == method.tasks(size)
        for available in subsets(list(code.tasks(size))):
            assert code.recoverable(available, size) == method.recoverable(available, size)


@pytest.mark.parametrize(("k", "r"), [(2, 1), (2, 2), (4, 2)])
def test_every_erasure_pattern_against_linear_algebra(k: int, r: int) -> None:
    """A member is determined if its unit vector lies in the span of the outputs' rows."""
    code = ErasureCode(k, r)
    for size in range(1, k + 1):
        rows = {i: np.eye(size)[i] for i in range(size)}
        rows |= {k + j: np.arange(1, size + 1.0) ** j for j in range(r)}
        assert set(code.tasks(size)) == set(rows)
        for available in subsets(list(rows)):
            given = np.array([rows[task] for task in available]).reshape(-1, size)
            rank = np.linalg.matrix_rank(given) if available else 0
            determined = frozenset(
                i
                for i in range(size)
                if available and np.linalg.matrix_rank(np.vstack([given, rows[i]])) == rank
            )
            assert code.recoverable(available, size) == determined
