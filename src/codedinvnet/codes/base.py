"""The interface of a code with its networks, and of a code with the models that its tasks run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from codedinvnet.codes.rules import Rules
from codedinvnet.errors import UserError


def check_k(k: int) -> None:
    """Refuse group sizes that are no groups.

    Raises:
        UserError: if k is below 2.
    """
    if k < 2:
        raise UserError(f"k must be at least 2, got {k}: a group of one is a plain copy")


class Encoded(NamedTuple):
    """What `Code.encode` makes of a group's members."""

    query: Tensor
    """(B, *input): one query for the task's model."""
    side: Tensor
    """(B, n) float32: what goes to the decoder past the model; n may be 0."""


class Code(Protocol):
    """How queries are mixed for extra tasks, and how outputs become the missing answers.

    An *output* is what a task's model returned for the task's queries, flattened, with the side
    features of `encode` behind it: (B, n) float32. All methods run under `torch.inference_mode`.
    """

    @property
    def rules(self) -> Rules:
        """The tasks, what outputs determine, and what tasks cost."""

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Make the query of a task that is encoded.

        Args:
            task: its number.
            queries: (B, members, *input), the members that the task needs.
        """

    def direct(self, output: Tensor) -> Tensor | None:
        """Map a data task's output (B, n) to its own scores (B, classes), without any group.

        None if the code is not systematic. The output of a systematic code's data task does not
        depend on the group.
        """

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Return scores (B, classes) for every member that these outputs determine, or guesses.

        Args:
            outputs: task -> (B, n), of the tasks that answered.
            size: the group's size.
        """

    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        """Return how far a complete group is from consistent, (B,), or None if one is missing.

        It is what a corrupt worker shows up in.
        """


class Computed(NamedTuple):
    """What a task's computation returned."""

    output: Tensor
    """(B, n) float32."""
    encode_seconds: float
    """The time that encoding took; 0 if the task is not encoded."""


@dataclass(frozen=True)
class Scheme:
    """A code with the models that its tasks run: what is evaluated, benchmarked and served.

    Attributes:
        name: of the method on the command line.
        code: mixes queries and decodes outputs.
        models: role -> the model, which maps a batch of queries (B, *input) to one tensor.
    """

    name: str
    code: Code
    models: Mapping[str, nn.Module]

    @property
    def rules(self) -> Rules:
        """The code's rules."""
        return self.code.rules

    @torch.inference_mode()
    def compute(self, task: int, queries: Tensor, size: int) -> Computed:
        """Do a task: the worker's part.

        Args:
            task: its number.
            queries: (B, members, *input), the members that the task needs.
            size: the group's size.
        """
        spec = self.rules.tasks(size)[task]
        if not spec.encoded:
            values: Tensor = self.models[spec.model](queries.flatten(0, 1))
            return Computed(values.reshape(len(queries), -1).float(), 0.0)
        began = time.perf_counter()
        encoded = self.code.encode(task, queries)
        seconds = time.perf_counter() - began
        values = self.models[spec.model](encoded.query).flatten(1).float()
        side = encoded.side
        return Computed(torch.cat([values, side], dim=1) if side.shape[1] else values, seconds)

