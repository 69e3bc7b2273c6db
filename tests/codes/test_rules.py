from __future__ import annotations

import itertools

import numpy as np
import pytest

from codedinvnet.codes.registry import METHODS
from codedinvnet.codes.rules import BACKUP, AnswersAll, Parities, Task


def subsets(tasks: list[int]) -> list[frozenset[int]]:
    return [
        frozenset(chosen)
        for n in range(len(tasks) + 1)
        for chosen in itertools.combinations(tasks, n)
    ]


@pytest.mark.parametrize(("k", "r"), [(2, 1), (4, 1), (4, 2), (5, 3), (3, 3)])
def test_tasks_that_share_a_group_answer_for_their_own_members(k: int, r: int) -> None:
    code = AnswersAll(k, cost=lambda count: 0.4 * count, r=r)
    for size in range(1, k + 1):
        tasks = code.tasks(size)
        extra = {number: task for number, task in tasks.items() if number >= k}
        assert list(extra) == list(range(k, k + min(r, size)))
        together = sorted(member for task in extra.values() for member in task.members)
        assert together == list(range(size))
        for task in extra.values():
            assert task.cost == pytest.approx(0.4 * len(task.members))
            assert len(task.members) <= -(-size // r)
        for available in subsets(list(tasks)):
            theirs = {m for number in available & extra.keys() for m in extra[number].members}
            assert code.recoverable(available, size) == theirs | (available - extra.keys())
    assert code.r == r
    assert AnswersAll(k).tasks(1)[k] == Task((0,), BACKUP, 1 / k)
    for size in (0, k + 1):
        with pytest.raises(ValueError, match="a group has 1 to"):
            code.tasks(size)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_rules_number_its_tasks_and_determine_what_is_here(name: str) -> None:
    for k in (2, 3, 5):
        code = METHODS[name].rules(k)
        assert (code.k, len(code.tasks(k))) == (k, k + code.r)
        assert list(code.tasks(k)) == list(range(k + code.r))
        assert code.recoverable(frozenset(code.tasks(k)), k) == frozenset(range(k))
        assert code.recoverable(frozenset(), k) == frozenset()
        for task in code.tasks(k).values():
            assert task.encoded or set(task.members) <= set(range(k))


@pytest.mark.parametrize(("k", "r"), [(2, 1), (2, 2), (4, 2)])
def test_every_erasure_pattern_against_linear_algebra(k: int, r: int) -> None:
    """A member is determined if its unit vector lies in the span of the outputs' rows."""
    code = Parities(k, r)
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
