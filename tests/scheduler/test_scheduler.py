"""Groups that fill, the workers that are chosen, and decoding."""

from __future__ import annotations

import pytest

from codedinvnet.scheduler.actions import Answer, AnswerDecoded, Compare, Decode, Fail, Forget, Send
from codedinvnet.scheduler.group import FILLER
from codedinvnet.scheduler.policies import POLICIES
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules
from tests.scheduler.model import ErasureCode, Model, only
from tests.scheduler.situations import coded

# Groups


@pytest.mark.parametrize(
    ("k", "requests", "groups", "left"),
    [
        (3, (7,), [(0, 1, 2), (3, 4, 5)], [6]),
        (3, (1, 1, 1), [(0, 1, 2)], None),
        (2, (1, 2, 1), [(1, 2), (0, 3)], None),
        (3, (2, 2), [(0, 1, 2)], [3]),
    ],
)
def test_a_request_fills_groups_with_its_own_queries_and_then_the_open_group(
    k: int, requests: tuple[int, ...], groups: list[tuple[int, ...]], left: list[int] | None
) -> None:
    model = coded(k, spare=8)
    queries = [query for count in requests for query in model.submit(count)]
    sends = only(model.new(), Send)
    assert [(s.members, s.task, s.size) for s in sends if s.size > 1] == [
        (tuple(queries[i] for i in group), k, k) for group in groups
    ]
    assert [s.members for s in sends if s.size == 1] == [(query,) for query in queries]
    open_group = model.scheduler.flying.open_group
    assert (open_group and open_group.members) == (left and [queries[i] for i in left])


def test_after_the_timeout_only_the_unanswered_are_coded() -> None:
    model = coded(4, spare=1)
    first, second, third = model.submit(3)
    model.result(*model.data(second))
    model.new()
    model.wait(0.021)
    actions = model.new()
    (parity,) = only(actions, Send)
    assert (parity.task, parity.members, parity.size) == (4, (first, third), 2)
    (forget,) = only(actions, Forget)
    assert forget.queries == (second,)
    # the renumbered members are decoded from what was sent under the old numbers
    model.result(*model.data(first), parity.attempt)
    (decode,) = only(model.new(), Decode)
    assert (set(dict(decode.outputs)), dict(decode.wanted)) == ({0, 4}, {third: 1})


def test_after_the_timeout_one_alone_is_copied() -> None:
    model = coded(3)
    first, second = model.submit(2)
    model.result(*model.data(first))
    model.new()
    model.wait(0.021)
    (copy,) = only(model.new(), Send)
    assert (copy.members, copy.size) == ((second,), 1)
    assert len({model.worker(attempt) for attempt in model.data(second)}) == 2
    model.result(copy.attempt)
    assert model.ended[second] == Answer(second, copy.attempt, model.worker(copy.attempt))


# Workers


def test_a_held_answer_frees_its_worker() -> None:
    model = Model("uncoded", 1)
    first, second = model.submit(2)
    (held,) = model.data(first)
    model.release(held)
    (sent,) = model.data(second)
    model.result(sent)
    assert first not in model.ended
    model.kill(0)  # the held answer has left it
    model.wait(60)
    model.result(held)
    assert model.ended[first] == Answer(first, held, model.worker(held))


# Decoding


def test_decoded_as_soon_as_determined() -> None:
    model = coded(3)
    first, second, third = model.submit(3)
    (parity,) = model.parities()
    (a,), (b,) = model.data(first), model.data(third)
    model.result(parity, a)
    assert not only(model.new(), Decode)
    model.result(b)
    (decode,) = only(model.new(), Decode)
    assert dict(decode.outputs) == {0: a, 2: b, 3: parity}
    assert dict(decode.wanted) == {second: 1}
    model.decoded(second)
    assert model.new() == [AnswerDecoded(second)]
    (late,) = model.data(second)
    model.result(late)
    compare, *rest = model.new()
    assert isinstance(compare, Compare)
    assert (compare.group, compare.size) == (decode.group, 3)
    assert dict(compare.outputs) == {0: a, 1: late, 2: b, 3: parity}
    assert dict(compare.workers) == {t: model.worker(o) for t, o in compare.outputs}
    assert [type(action) for action in rest] == [Forget]


def test_a_direct_answer_overtakes_a_decoding() -> None:
    model = coded(2)
    first, second = model.submit(2)
    model.result(*model.parities(), *model.data(first))
    assert model.decoding == [second]
    (late,) = model.data(second)
    model.result(late)
    assert model.ended[second] == Answer(second, late, model.worker(late))
    model.new()
    model.decoded(second)
    assert model.new() == []


def test_who_does_not_accept_decoded_answers_gets_none() -> None:
    model = coded(2)
    first, second = model.submit(2, accept=False)
    model.result(*model.parities(), *model.data(first))
    model.fail(*model.data(second))  # a parity is no hope for it
    (again,) = model.data(second)
    model.result(again)
    assert model.ended[second] == Answer(second, again, model.worker(again))


def test_fillers_make_up_a_fixed_size() -> None:
    model = Model("coded", 5, ErasureCode(4, fixed_size=True))
    first, second = model.submit(2)
    model.wait(0.021)
    (parity,) = (model.sent[attempt] for attempt in model.parities())
    assert (parity.members, parity.size, parity.task) == ((first, second), 4, 4)
    (a,) = model.data(first)
    model.result(parity.attempt, a)
    (decode,) = only(model.new(), Decode)
    assert dict(decode.outputs) == {0: a, 2: FILLER, 3: FILLER, 4: parity.attempt}
    assert (decode.size, dict(decode.wanted)) == (4, {second: 1})
    (late,) = model.data(second)
    model.result(late)
    (compare,) = only(model.new(), Compare)
    assert set(dict(compare.workers)) == {0, 1, 4}


def test_a_code_that_is_not_systematic_waits_for_its_group() -> None:
    model = Model("coded", 5, ErasureCode(3, 2, systematic=False))
    pair = model.submit(2)
    assert model.new() == []
    model.wait(0.021)
    sends = only(model.new(), Send)
    assert [(s.task, s.members, s.size) for s in sends] == [
        (task, tuple(pair), 2) for task in (0, 1, 3, 4)
    ]
    model.result(sends[1].attempt)
    assert not only(model.new(), Decode)
    model.result(sends[3].attempt)
    (decode,) = only(model.new(), Decode)
    assert dict(decode.outputs) == {1: sends[1].attempt, 4: sends[3].attempt}
    assert dict(decode.wanted) == {pair[0]: 0, pair[1]: 1}
    for query in pair:
        model.decoded(query)
        assert model.ended[query] == AnswerDecoded(query)


def test_a_query_that_kills_its_workers_is_given_up() -> None:
    model = Model("uncoded", 3, max_losses=3)
    (query,) = model.submit()
    for _ in range(3):
        (attempt,) = model.data(query)
        worker = model.worker(attempt)
        model.kill(worker)
        model.up(worker)
    assert model.ended[query] == Fail(query, "lost 3 times: killed")


@pytest.mark.parametrize(
    ("policy", "code", "needed"),
    [("coded", ErasureCode(3, 2), 5), ("replicate", None, 2), ("uncoded", ErasureCode(3), 1)],
)
def test_too_few_workers(policy: str, code: ErasureCode | None, needed: int) -> None:
    with pytest.raises(ValueError, match=f"{needed - 1} are too few: .* needs {needed},"):
        Scheduler(Rules(needed - 1, POLICIES[policy]), code)
    Scheduler(Rules(needed, POLICIES[policy]), code)
