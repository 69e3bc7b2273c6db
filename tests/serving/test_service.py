from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from codedinvnet.models.base import Scores, Signature, TensorSpec
from codedinvnet.serving.answers import Answered, BadRequest, DeadlinePassed, QueryFailed
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.served import Classifier, OwnModel
from codedinvnet.serving.service import Request, Response, Service

OWN = OwnModel(
    "own",
    Signature(
        inputs=(TensorSpec("a", "FP32", (2,)), TensorSpec("b", "INT64", ())),
        outputs=(TensorSpec("sum", "FP32", (2,)), TensorSpec("b", "INT64", ())),
        scores=Scores("sum", "logits"),
    ),
)
INPUTS = {"a": np.arange(4, dtype=np.float32).reshape(2, 2), "b": np.array([10, 20])}


class Front:
    """Answers queries in place of a front end: adds the inputs, or ends as it is told."""

    reliance: SimpleNamespace | None = None

    def __init__(self, *ends: QueryFailed) -> None:
        self.ends, self.scheduler = ends, SimpleNamespace(systematic=True)
        self.asked: dict[str, Any] = {}

    async def infer(
        self, queries: Sequence[Mapping[str, np.ndarray]], **asked: Any
    ) -> list[Answered | QueryFailed]:
        self.asked = asked
        answers: list[Answered | QueryFailed] = [
            Answered(
                {"sum": q["a"] + q["b"].astype(np.float32), "b": q["b"]},
                f"outcome {i}",
                1.0,
                0.1 * i,
            )
            for i, q in enumerate(queries)
        ]
        return [*self.ends, *answers[len(self.ends) :]]


def answer(front: Front, *outputs: str, **request: Any) -> Response:
    wanted = tuple((name, False) for name in outputs)
    service = Service(cast(FrontEnd, front), OWN)
    return asyncio.run(service.answer(Request(INPUTS, outputs=wanted, **request), began=5.0))


def test_a_request_is_split_and_its_answers_are_joined() -> None:
    front = Front()
    response = answer(front, "outcome", "sum", "b", identity="q", timeout=2.0)
    assert list(response.outputs) == ["outcome", "sum", "b"]
    assert response.outputs["sum"].dtype == np.float32
    assert response.outputs["sum"].tolist() == [[10, 11], [22, 23]]
    assert response.outputs["b"].tolist() == [10, 20]
    assert response.outputs["outcome"].tolist() == [b"outcome 0", b"outcome 1"]
    assert response.work_seconds == pytest.approx(0.1)
    assert (front.asked["name"], front.asked["deadline"], front.asked["began"]) == ("q", 2.0, 5.0)


def test_a_long_text_is_a_large_answer() -> None:
    texts = np.array([b"", b"abc"], object)
    assert Response({"text": texts, "sum": np.zeros((2, 2))}, 0.0).values == 2 + 3 + 4


@pytest.mark.parametrize(
    ("outputs", "accept", "taken"),
    [
        (("sum", "outcome"), True, True),
        (("sum",), False, False),
        (("sum", "b"), True, False),
    ],
)
def test_outputs_that_decoded_answers_lack_are_answered_directly(
    outputs: tuple[str, ...], accept: bool, taken: bool
) -> None:
    front = Front()
    answer(front, *outputs, accept_decoded=accept)
    assert front.asked["accept_decoded"] is taken


def test_a_request_is_answered_as_a_whole_or_not_at_all() -> None:
    with pytest.raises(DeadlinePassed, match=r"^1 of 2 queries: deadline passed$"):
        answer(Front(DeadlinePassed("deadline")), "sum")
    with pytest.raises(DeadlinePassed, match=r"^1 of 2 queries: deadline passed; .*: it refused$"):
        answer(Front(DeadlinePassed("deadline", "it refused")), "sum")
    with pytest.raises(DeadlinePassed, match=r"^1 of 2 queries: deadline passed; at worker 3$"):
        answer(Front(DeadlinePassed("deadline", where="at worker 3")), "sum")
    with pytest.raises(QueryFailed, match=r"^2 of 2 queries failed: lost 5 times$") as caught:
        answer(Front(DeadlinePassed("deadline"), QueryFailed("lost 5 times")), "sum")
    assert not isinstance(caught.value, DeadlinePassed)


@pytest.mark.parametrize("own", [None, 0.0, 9.0])
def test_a_timeout_that_is_over_at_once_stays_one(own: float | None) -> None:
    assert Request(INPUTS, timeout=own).within(0.0).timeout == 0.0
    assert Request(INPUTS, timeout=own).within(2.0).timeout == (2.0 if own is None else min(own, 2))


def test_a_method_without_direct_answers_cannot_give_one() -> None:
    front = Front()
    front.scheduler.systematic = False
    with pytest.raises(BadRequest, match=r"^parameters\.accept_decoded: "):
        answer(front, "sum", accept_decoded=False)
    answer(front, "sum")


def test_scores_are_answered_in_the_names_and_types_of_the_served_model() -> None:
    scores = torch.tensor([[0.0, 1.0], [3.0, 2.0]], dtype=torch.float64)
    first, second = OWN.answer(scores)
    assert list(first) == ["sum"]
    assert first["sum"].dtype == np.float32
    assert second["sum"].tolist() == [[3, 2]]
    _, second = Classifier("mnist", (1, 2, 3), ("cat", "dog")).answer(scores)
    assert second["label"].tolist() == [0]
    assert second["label"].dtype == np.int64
    assert second["probabilities"] == pytest.approx(np.array([[0.7310586, 0.2689414]]))


def test_a_limit_on_disagreement_is_told_as_it_stands_or_refused() -> None:
    front = Front()
    with pytest.raises(BadRequest, match="max_disagreement"):
        answer(front, "sum", max_disagreement=0.1)
    assert front.asked == {}
    front.reliance = SimpleNamespace(limit=0.01, kept=lambda asked: min(asked, 0.01))
    assert answer(front, "sum", max_disagreement=0.1).parameters == {"max_disagreement": 0.01}
    assert front.asked["limit"] == 0.1
    assert answer(front, "sum").parameters == {}
