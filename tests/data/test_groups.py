from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.common.errors import UserError
from codedinvnet.data import random_groups, split_indices, spread_rows


@given(st.data(), st.integers(1, 300), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_split_indices(draw: st.DataObject, count: int, seed: int) -> None:
    validation = draw.draw(st.integers(0, count - 1))
    train, held = split_indices(count, validation, seed)
    assert len(held) == validation
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(count))
    again = split_indices(count, validation, seed)
    assert torch.equal(train, again[0])
    assert torch.equal(held, again[1])


@given(st.integers(0, 300), st.integers(1, 300))
@settings(deadline=None)
def test_spread_rows(count: int, wanted: int) -> None:
    rows = torch.arange(count) + 7
    found = spread_rows(rows, wanted)
    assert len(found) == min(count, wanted)
    assert set(found.tolist()) <= set(rows.tolist())
    assert bool((found.diff() > 0).all())


@given(st.data(), st.integers(2, 200), st.integers(0, 1000))
@settings(deadline=None)
def test_random_groups(draw: st.DataObject, count: int, seed: int) -> None:
    k = draw.draw(st.integers(2, count))
    groups = random_groups(count, k, torch.Generator().manual_seed(seed))
    assert groups.members.shape == groups.counted.shape == (-(-count // k), k)
    assert groups.members.dtype == torch.int64
    assert groups.counted.dtype == torch.bool
    assert sorted(groups.members[groups.counted].tolist()) == list(range(count))
    assert all(len(set(group)) == k for group in groups.members.tolist())
    assert groups.counted[:-1].all()
    again = random_groups(count, k, torch.Generator().manual_seed(seed))
    assert torch.equal(groups.members, again.members)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_cannot_be_split_or_grouped_is_refused(count: int) -> None:
    for validation in (-1, count, count + 1):
        with pytest.raises(UserError, match=f"cannot set {validation} of {count} images"):
            split_indices(count, validation, 0)
    for k in (0, 1, count + 1):
        with pytest.raises(UserError, match=f"k={k} cannot be made of {count} images"):
            random_groups(count, k, torch.Generator())
