from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.parm import ParM
from tests.codes.linear import (
    CLASSES,
    SHAPE,
    Linear,
    assert_answers,
    computed,
    images,
    made,
    members_of,
    outputs_of,
    without,
)

SIZES = (2, 3, 4, 10)


def exact(k: int) -> Scheme:
    """Return ParM whose parity model is right: k times a linear classifier."""
    return made(ParM, Linear(), k, part=Linear(factor=k))


@pytest.mark.parametrize("k", SIZES)
def test_tasks(k: int) -> None:
    method = exact(k)
    assert (method.rules.k, method.rules.r, method.rules.fixed_size) == (k, 1, True)
    assert members_of(method, k) == {**{i: (i,) for i in range(k)}, k: tuple(range(k))}
    with pytest.raises(ValueError, match=f"a group has {k} members, got {k - 1}"):
        members_of(method, k - 1)


@pytest.mark.parametrize("k", SIZES)
def test_a_linear_model_decodes_every_erasure_pattern_exactly(k: int) -> None:
    method = exact(k)
    group = images(k)
    outputs = outputs_of(method, group)
    tasks = range(k + 1)
    for lost in chain.from_iterable(combinations(tasks, n) for n in range(3)):
        rest = without(outputs, *lost)
        members = {i for i in range(k) if i not in lost}
        if len(lost) == 1:
            members = set(range(k))
        assert method.rules.recoverable(frozenset(rest), k) == members
        assert_answers(method.decode(rest, k), Linear(), group, members)


def test_the_parity_model_sees_the_average_image_and_is_weighed_by_its_output() -> None:
    k = 4
    parity_model = Linear(factor=k)
    method = made(ParM, Linear(), k, part=parity_model)
    group = torch.randint(0, 256, (2, k, *SHAPE), dtype=torch.uint8)
    computed(method, k, group)
    torch.testing.assert_close(parity_model.seen[-1], (group / 255).mean(1))
    outputs = outputs_of(method, images(k))
    wrong = {**outputs, k: outputs[k] + 1.0}
    answers = method.decode(without(wrong, 1), k)
    torch.testing.assert_close(answers[1], outputs[1] + 1.0)
    assert method.parameters == 2 * (32 * CLASSES + CLASSES)
