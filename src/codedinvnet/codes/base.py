"""The interface of a code, and of a code with the models that its tasks run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from codedinvnet.codes.rules import SERVED, CodeRules
from codedinvnet.common.errors import UserError


def check_k(k: int) -> None:
    """Refuse group sizes that are no groups.

    Raises:
        UserError: if k is below 2.
    """
    if k < 2:
        raise UserError(f"k must be at least 2, got {k}: a group of one is a plain copy")


class Code(ABC):
    """How queries are mixed for extra tasks, and how outputs become the missing answers.

    An *output* is what a task's model returned for the task's queries, flattened: (B, n). A
    `Scheme` calls all methods under `torch.inference_mode`.
    """

    rules: CodeRules
    """The tasks, what outputs determine, and what tasks cost."""

    def encode(self, task: int, queries: Tensor) -> Tensor:
        """Make the query (B, *input) of a task that is encoded.

        Args:
            task: its number.
            queries: (B, members, *input), the members that the task needs, as clients sent them:
                images are uint8 in 0..255, or floats in 0..1. `codedinvnet.models.coded.prepare`
                makes floats of both.
        """
        raise ValueError(f"task {task} is not encoded")

    @abstractmethod
    def direct(self, output: Tensor) -> Tensor | None:
        """Map a data task's output (B, n) to its own scores (B, classes), without any group.

        None if the code is not systematic. The output of a systematic code's data task does not
        depend on the group.
        """

    @abstractmethod
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Return scores (B, classes), logits, of every member that these outputs determine.

        Args:
            outputs: task -> (B, n), of the tasks that answered.
            size: the group's size.
        """


class ScoresCode(Code):
    """A code whose data task i sends the scores of member i, whatever the group.

    Args:
        rules: which members the outputs determine.
    """

    def __init__(self, rules: CodeRules) -> None:
        check_k(rules.k)
        self.rules = rules

    @abstractmethod
    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        """Return scores (B, classes), logits, of a missing member that is determined."""

    def direct(self, output: Tensor) -> Tensor | None:
        """Return the output: it is the scores."""
        return output

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer the members whose scores are here, and the missing ones that are determined."""
        found = self.rules.recoverable(frozenset(outputs), size)
        return {
            i: outputs[i] if i in outputs else self.made_up(i, outputs, size) for i in sorted(found)
        }


class Computed(NamedTuple):
    """What a task's computation returned."""

    output: Tensor
    """(B, n), of the model's own type."""
    encode_seconds: float
    """The time that encoding took; 0 if the task is not encoded."""


@dataclass(frozen=True)
class Scheme:
    """A code with the models that its tasks run: what is evaluated, benchmarked and served.

    Attributes:
        name: the method's name on the command line.
        code: mixes queries and decodes outputs.
        models: role -> the model, which maps a batch of queries (B, *input) to one tensor.
        shape: the shape of one query.
        chosen: what the method chose on validation images, as its result row states it.
        classes: how many scores an answer has; 0 if that is not known.
    """

    name: str
    code: Code
    models: Mapping[str, nn.Module]
    shape: tuple[int, ...]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 0

    @property
    def rules(self) -> CodeRules:
        """The code's rules."""
        return self.code.rules

    @property
    def device(self) -> torch.device:
        """Where the served model computes."""
        parameter = next(self.models[SERVED].parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def parameters(self) -> int:
        """The number of weights that a worker holds, those that encode and decode among them."""
        parts = (*self.models.values(), *vars(self.code).values())
        held = {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
        return sum(p.numel() for p in held)

    @torch.inference_mode()
    def compute(self, task: int, queries: Tensor) -> Computed:
        """Do a task: the worker's part.

        The group's size is not asked for: members answer before it is known, and an extra task
        needs all of them.

        Args:
            task: its number.
            queries: (B, members, *input), the members that the task needs.
        """
        queries = queries.to(self.device)
        spec = self.rules.tasks(self.rules.k)[task]
        if not spec.encoded:
            values: Tensor = self.models[spec.model](queries.flatten(0, 1))
            return Computed(values.reshape(len(queries), -1), 0.0)
        began = time.perf_counter()
        query = self.code.encode(task, queries)
        seconds = time.perf_counter() - began
        return Computed(self.models[spec.model](query).flatten(1), seconds)

    @torch.inference_mode()
    def direct(self, output: Tensor) -> Tensor | None:
        """Return `Code.direct`."""
        return self.code.direct(output)

    @torch.inference_mode()
    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Return `Code.decode`.

        Raises:
            ValueError: if an answer has not the shape that it should have.
        """
        answers = self.code.decode(outputs, size)
        rows = len(next(iter(outputs.values()))) if outputs else 0
        for member, scores in answers.items():
            if scores.ndim != 2 or scores.shape != (rows, self.classes or scores.shape[1]):
                raise ValueError(
                    f"{self.name}: decode answers member {member} with scores "
                    f"{tuple(scores.shape)}, not ({rows}, {self.classes or 'classes'})"
                )
        return answers
