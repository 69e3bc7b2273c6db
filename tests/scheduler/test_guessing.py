"""What nothing determines is guessed."""

from __future__ import annotations

from typing import Any

import pytest

from codedinvnet.scheduler.actions import DEADLINE, Answer, AnswerDecoded, Decode, Fail
from codedinvnet.scheduler.tuning import TUNING
from tests.scheduler.model import ErasureCode, Model, only


def guessing(policy: str = "coded", **rules: Any) -> tuple[Model, list[int]]:
    """Return a model with a group of four of which the parity and one member are here."""
    model = Model(policy, 5, ErasureCode(4, guesses=True), hang_timeout=100.0, **rules)
    queries = model.submit(3, timeout=1.0) + model.submit(timeout=1.0)
    model.result(*model.parities(), *model.data(queries[0]))
    return model, queries[1:]


@pytest.mark.parametrize("policy", ["coded", "coded+hedge"])
def test_what_nothing_determines_is_guessed_at_the_deadline(policy: str) -> None:
    model, missing = guessing(policy)
    model.wait(0.9)
    assert not model.decoding, "a better answer may come"
    model.new()
    model.wait(0.1)
    (decode,) = only(model.new(), Decode)
    assert (decode.guess, [query for query, _ in decode.wanted]) == (True, missing)
    for query in missing:
        model.decoded(query)
        assert model.ended[query] == AnswerDecoded(query)


def test_one_that_is_determined_is_not_guessed() -> None:
    model = Model("coded", 4, ErasureCode(3, guesses=True), hang_timeout=100.0)
    queries = model.submit(3)
    model.result(*model.data(queries[0]), *model.data(queries[1]))
    model.new()
    model.result(*model.parities())
    (decode,) = only(model.new(), Decode)
    assert dict(decode.wanted) == {queries[2]: 2}
    assert not decode.guess


def test_an_output_overtakes_a_guess() -> None:
    model, missing = guessing()
    model.wait(1)
    (late,) = model.data(missing[0])
    model.result(late)
    assert model.ended == {**model.ended, missing[0]: Answer(missing[0], late, model.worker(late))}
    assert model.decoding == missing


def test_a_guess_that_takes_too_long_is_not_waited_for() -> None:
    model, missing = guessing()
    model.wait(1 + TUNING.grace)
    assert {model.ended[query] for query in missing} == {Fail(q, DEADLINE) for q in missing}


def test_what_workers_keep_failing_on_is_guessed() -> None:
    model, missing = guessing(max_losses=2)
    model.fail(*(attempt for query in missing for attempt in model.data(query)))
    assert not model.decoding
    while pending := [attempt for query in missing for attempt in model.data(query)]:
        model.fail(pending[0])
    assert sorted(model.decoding) == missing
    for query in missing:
        model.decoded(query)
        assert model.ended[query] == AnswerDecoded(query)
