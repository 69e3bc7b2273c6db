from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from codedinvnet.codes.patterns import erasure_patterns


def test_patterns_are_all_or_a_seeded_sample() -> None:
    assert erasure_patterns(3, 1, 2, 6, 0) == list(combinations(range(4), 2))
    assert erasure_patterns(4, 1, 0, 1, 0) == [()]
    sample = erasure_patterns(10, 1, 3, 30, 0)
    assert len(set(sample)) == 30
    assert all(len(set(lost)) == 3 and max(lost) < 11 for lost in sample)
    assert all(lost == tuple(sorted(lost)) for lost in sample)
    assert sample == erasure_patterns(10, 1, 3, 30, 0) != erasure_patterns(10, 1, 3, 30, 1)


@pytest.mark.parametrize(
    ("extra", "missing", "limit"), [(1, 2, 30), (1, 3, 30), (1, 3, 164), (10, 3, 30), (13, 5, 50)]
)
def test_a_sample_loses_extra_workers_as_often_as_all_patterns(
    extra: int, missing: int, limit: int
) -> None:
    def lost_extra(patterns: list[tuple[int, ...]]) -> Counter[int]:
        return Counter(sum(worker >= 10 for worker in lost) for lost in patterns)

    whole = list(combinations(range(10 + extra), missing))
    every = lost_extra(whole)
    for seed in range(3):
        sample = erasure_patterns(10, extra, missing, limit, seed)
        assert len(set(sample)) == limit
        found = lost_extra(sample)
        for count, size in every.items():
            assert abs(found[count] - limit * size / len(whole)) < 1
