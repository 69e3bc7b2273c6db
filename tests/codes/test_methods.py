"""Codes whose data tasks send scores: every erasure pattern, and what their parts cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.equal_cost import count_macs, served_macs
from codedinvnet.codes.invnet import Oracle
from codedinvnet.codes.method import Method, given_by
from codedinvnet.codes.parm import ParM
from codedinvnet.codes.plain import Plain, Replication
from codedinvnet.codes.registry import find_method
from codedinvnet.codes.rules import is_systematic
from codedinvnet.models.bundle import load_bundle
from codedinvnet.nn.lipschitz import constrain_exactly
from tests.codes.linear import (
    Linear,
    around,
    images,
    made,
    members_of,
    outputs_of,
    tiny_model,
    without,
)

K = 4


def each(network: nn.Module, group: Tensor) -> Tensor:
    """Return the scores (B, m, classes) of a network that takes one image at a time."""
    return torch.stack([network(group[:, i]) for i in range(group.shape[1])], dim=1)


CASES: dict[type[Method], tuple[int, nn.Module | None, Callable[[nn.Module, Tensor], Tensor]]] = {
    Plain: (0, None, each),
    Replication: (K, None, each),
    SmallBackup: (1, Linear(seed=1), each),
    ParM: (1, Linear(factor=K), lambda part, group: each(part, group) / K),
}
"""Method -> extra tasks, the part, and what the part makes of the missing members."""


@pytest.mark.parametrize("size", range(1, K + 1))
@pytest.mark.parametrize("kind", CASES)
def test_every_erasure_pattern(kind: type[Method], size: int) -> None:
    """ParM's part is right, since its classifier is linear; the others' need not be."""
    served = Linear()
    extra, part, missing = CASES[kind]
    method = made(kind, served, K, part=part)
    rules = method.rules
    assert (rules.k, rules.r, is_systematic(rules)) == (K, extra, True)
    if rules.fixed_size and size < K:
        with pytest.raises(ValueError, match=f"a group has {K} members, got {size}"):
            members_of(method, size)
        return
    group = images(size)
    with torch.no_grad():
        direct, made_up = each(served, group), missing(part or served, group)
    outputs = outputs_of(method, group)
    for lost in chain.from_iterable(combinations(outputs, n) for n in range(len(outputs) + 1)):
        rest = without(outputs, *lost)
        answers = method.decode(rest, size)
        assert set(answers) == rules.recoverable(frozenset(rest), size)
        for member, scores in answers.items():
            wanted = made_up if member in lost else direct
            torch.testing.assert_close(scores, wanted[:, member], rtol=0.0, atol=1e-9)


def test_a_part_is_as_wide_as_its_cost_allows() -> None:
    name = "small-backup"
    method, given = find_method(name), given_by(load_bundle("mnist"), K)
    width = method.made_with(given, None)["width"]

    def spent(width: int) -> int:
        part = method.untrained(given, {"width": width}).eval()
        return K * count_macs(lambda: part(torch.zeros(1, *given.shape)))

    assert spent(width) <= served_macs(given.coded) < spent(width + 1)
    found = [method.rules(K).tasks(size)[K].cost for size in (K, 2)]
    assert found == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("size", range(1, K + 1))
def test_the_oracle_answers_every_position_as_if_nobody_were_missing(size: int) -> None:
    model = tiny_model()
    constrain_exactly(model.network)
    method = around(Oracle, model, K)
    group = torch.rand(3, size, 1, 8, 8, dtype=torch.float64)
    outputs = outputs_of(method, group)
    right = [model.classify(model.embed(group[:, i])) for i in range(size)]
    for lost in range(size):
        answers = method.decode(without(outputs, lost), size)
        assert set(answers) == set(range(size))
        for member in range(size):
            torch.testing.assert_close(answers[member], right[member], rtol=0.0, atol=1e-3)
    assert method.compute(K, group).encode_seconds > 0
