from __future__ import annotations

import pytest
import torch

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.equal_cost import count_macs, served_macs
from codedinvnet.codes.method import Given, Method, given_by
from codedinvnet.codes.registry import find_method
from codedinvnet.models.bundle import load_bundle
from tests.codes.linear import (
    Linear,
    assert_extra_task_answers,
    images,
    made,
    members_of,
)

K = 4


@pytest.mark.parametrize("size", range(1, K + 1))
def test_every_erasure_pattern_is_answered_by_the_backup(size: int) -> None:
    served, backup = Linear(seed=0), Linear(seed=1)
    method = made(SmallBackup, served, K, part=backup)
    assert members_of(method, size) == {**{i: (i,) for i in range(size)}, K: tuple(range(size))}
    group = images(size)
    with torch.no_grad():
        extra = torch.stack([backup(group[:, i]) for i in range(size)], 1)
    outputs = assert_extra_task_answers(method, served, group, extra)
    assert outputs[K].shape == (5, 3 * size)


def spent_by(method: Method, given: Given, width: int) -> int:
    network = method.untrained(given, {"width": width}).eval()
    return K * count_macs(lambda: network(torch.zeros(1, *given.shape)))


def test_a_dearer_backup_is_wider_and_says_what_it_costs() -> None:
    given = given_by(load_bundle("mnist"), K)
    served = served_macs(given.coded)
    widths = {}
    for name, cost in (("small-backup", 1.0), ("small-backup@1.4", 1.4), ("small-backup@0.5", 0.5)):
        method = find_method(name)
        assert (method.name, method.cost) == (name, cost)
        widths[cost] = width = method.made_with(given, None)["width"]
        spent, more = (spent_by(method, given, w) for w in (width, width + 1))
        assert spent <= cost * served < more
        tasks = method.rules(K).tasks(K), method.rules(K).tasks(2)
        assert [found[K].cost for found in tasks] == pytest.approx([cost, cost * 2 / K])
    assert widths[0.5] < widths[1.0] < widths[1.4]
