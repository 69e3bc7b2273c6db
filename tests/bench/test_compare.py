from __future__ import annotations

import pytest
import torch

from codedinvnet.bench.compare import paired_difference, pooled
from codedinvnet.bench.erasures import Counts


def drawn(rate: float, seed: int, groups: int = 400, k: int = 10) -> Counts:
    generator = torch.Generator().manual_seed(seed)
    correct = (torch.rand(groups, k, generator=generator) < rate).sum(1)
    return Counts(correct, torch.full((groups,), k))


def test_a_clear_difference_is_found_with_its_size() -> None:
    a, b = [drawn(0.9, s) for s in range(3)], [drawn(0.8, 10 + s) for s in range(3)]
    found = paired_difference(a, b)
    assert found.margin == pytest.approx(10, abs=1.5)
    assert found.low < found.margin < found.high
    assert found.low > 5
    assert found.p < 0.01
    back = paired_difference(b, a)
    assert back.margin == pytest.approx(-found.margin)
    assert back.p == pytest.approx(found.p, abs=0.01)


def test_equal_methods_do_not_differ() -> None:
    a, b = [drawn(0.9, 1)], [drawn(0.9, 2)]
    found = paired_difference(a, b)
    assert found.low < 0 < found.high
    assert found.p > 0.05
    same = paired_difference(a, a)
    assert (same.margin, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_uniform_when_nothing_differs() -> None:
    """Of many comparisons of equals, some 5 % lie below 0.05, not 30 %."""
    pairs = (([drawn(0.9, s, 150)], [drawn(0.9, 1000 + s, 150)]) for s in range(400))
    values = [paired_difference(a, b).p for a, b in pairs]
    assert 8 <= sum(p < 0.05 for p in values) <= 36
    assert 160 <= sum(p < 0.5 for p in values) <= 240


def test_groups_are_the_units_not_answers() -> None:
    """Answers that are right or wrong by whole groups vary ten times as much in variance."""
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=generator) < 0.5).long() * 10
    whole = Counts(right, torch.full((400,), 10))
    spread = Counts(torch.full((400,), 5), torch.full((400,), 10))
    a = paired_difference([whole], [spread])
    b = paired_difference([drawn(0.5, 3)], [spread])
    assert (a.high - a.low) == pytest.approx((b.high - b.low) * 10**0.5, rel=0.25)


def test_pairing_helps_when_the_groups_are_hard_for_both() -> None:
    a = drawn(0.7, 1)
    b = Counts((a.correct - 1).clamp_min(0), a.scored)
    assert paired_difference([a], [b]).p < 0.01
    assert paired_difference([a], [b]).low > 9


def test_other_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="not given the same groups"):
        paired_difference([drawn(0.9, 1, 400)], [drawn(0.9, 1, 399)])
    with pytest.raises(ValueError, match="not given the same groups"):
        paired_difference([], [])


def test_fewer_groupings_are_compared_on_those_both_have() -> None:
    a, b = [drawn(0.9, s) for s in range(3)], [drawn(0.8, 10)]
    assert paired_difference(a, b) == paired_difference(a[:1], b)


def test_seeds_are_added_up() -> None:
    one, two = [drawn(0.9, 1), drawn(0.9, 2)], [drawn(0.8, 3), drawn(0.8, 4)]
    found = pooled([one, two])
    assert len(found) == 2
    assert torch.equal(found[1].correct, one[1].correct + two[1].correct)
    assert torch.equal(found[1].scored, torch.full((400,), 20))
