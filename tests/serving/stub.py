"""A dispatcher's stand-in, which answers queries by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np

from codedinvnet.models.base import Scores, Signature, TensorSpec
from codedinvnet.net.guard import Token
from codedinvnet.serving.answers import Answered, NotNow, QueryFailed
from codedinvnet.serving.dispatch import Dispatcher, Timing
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.service import InferenceService

OWN = OwnModel(
    "own",
    Signature(
        inputs=(TensorSpec("a", "FP32", (2,)), TensorSpec("b", "INT64", ())),
        outputs=(TensorSpec("sum", "FP32", (2,)), TensorSpec("b", "INT64", ())),
        scores=Scores("sum", "logits"),
    ),
)


def add(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"sum": inputs["a"] + inputs["b"].astype(np.float32)[:, None], "b": inputs["b"]}


class Stub:
    """Answers queries by a function, or ends them as a test says.

    Args:
        ends: how the first ones end.
        compute: answers the others.
        deadline: seconds.
    """

    def __init__(
        self, *ends: QueryFailed, compute: Any = add, deadline: float = 20.0, ready: bool = True
    ) -> None:
        self.ends, self.compute, self.timing = ends, compute, Timing(deadline)
        self.scheduler = SimpleNamespace(systematic=True, workers_up=1)
        self.supervisor = SimpleNamespace(is_live=True)
        self.gate: Any = None
        self.metrics, self.is_up = Metrics(), ready
        self.error: Exception | None = None
        self.asked: dict[str, Any] = {}

    def check_room(self, queries: int, seconds: float | None = None) -> None:
        if self.error is not None:
            raise self.error

    def refuse(self, queries: int) -> NoReturn:
        raise NotNow("overloaded")

    async def infer(
        self, queries: Sequence[Mapping[str, np.ndarray]], **asked: Any
    ) -> list[Answered | QueryFailed]:
        self.asked = asked
        answers: list[Answered | QueryFailed] = [
            Answered(self.compute(query), f"outcome {i}", 1.0, 0.1 * i)
            for i, query in enumerate(queries)
        ]
        return [*self.ends, *answers[len(self.ends) :]]

    def service(
        self, served: Any = OWN, max_batch: int = 4, memory: int = 1 << 30
    ) -> InferenceService:
        return InferenceService(cast(Dispatcher, self), served, max_batch, memory)


def token_of(text: str) -> Token:
    """Return a token without a file."""
    token = Token(None)
    token.text = text
    return token
