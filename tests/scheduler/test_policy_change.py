"""Policies that change while queries are under way."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.actions import AnswerDecoded, Send
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import coded, know_times


def test_the_open_group_ends_by_the_code_that_it_began_with() -> None:
    model = coded(3)
    lost, other = model.submit(2)
    model.change("hedge")
    assert model.scheduler.dispatcher.code.k == 1
    (parity_task,) = model.parities()
    model.kill(model.worker(*model.data(lost)))
    model.result(*model.data(other), parity_task)
    model.decoded(lost)
    assert isinstance(model.ended[lost], AnswerDecoded)
    (single,) = model.submit()
    assert [send.size for send in only(model.new(), Send)][-1] == 1
    model.result(*model.data(single))


def test_what_is_late_already_is_copied_under_a_policy_with_copies() -> None:
    model = Model("uncoded", workers=3, hedge_share=1.0)
    know_times(model)
    (query,) = model.submit()
    model.wait(0.1)
    assert len(model.data(query)) == 1
    model.change("hedge")
    model.wait(0.0)
    assert len(model.data(query)) == 2


def test_nothing_is_copied_under_a_policy_without_copies() -> None:
    model = Model("hedge", workers=3, hedge_share=1.0)
    know_times(model)
    (query,) = model.submit()
    model.change("uncoded")
    model.wait(0.1)
    assert len(model.data(query)) == 1
    model.change("hedge")
    model.wait(0.0)
    assert len(model.data(query)) == 2


@pytest.mark.parametrize(
    ("policy", "workers", "code", "wanted"),
    [
        ("hedge", 4, None, "coded"),
        ("uncoded", 1, None, "replicate"),
        ("uncoded", 3, ErasureCode(3), "coded"),
        ("coded", 4, ErasureCode(2, 2, systematic=False), "uncoded"),
    ],
)
def test_a_policy_that_cannot_be_changes_nothing(
    policy: str, workers: int, code: ErasureCode | None, wanted: str
) -> None:
    model = Model(policy, workers, code)
    model.submit()
    assert not model.change(wanted)
    assert model.scheduler.chosen.name == policy
