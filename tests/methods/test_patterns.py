from __future__ import annotations

from itertools import combinations

from codedinvnet.methods.patterns import erasure_patterns


def test_patterns_are_all_or_a_seeded_sample() -> None:
    assert erasure_patterns(4, 2, 6, 0) == list(combinations(range(4), 2))
    assert erasure_patterns(5, 0, 1, 0) == [()]
    sample = erasure_patterns(11, 3, 30, 0)
    assert len(set(sample)) == 30
    assert all(len(set(lost)) == 3 and max(lost) < 11 for lost in sample)
    assert sample == erasure_patterns(11, 3, 30, 0) != erasure_patterns(11, 3, 30, 1)
