"""The interface of a coding method: one object is evaluated, benchmarked and served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from codedinvnet.errors import UserError


def check_k(k: int) -> None:
    """Refuse group sizes that are no groups.

    Raises:
        UserError: if k is below 2.
    """
    if k < 2:
        raise UserError(f"k must be at least 2, got {k}: a group of one is a plain copy")


class CodedMethod(Protocol):
    """How the queries of a coding group become tasks for workers, and outputs become answers.

    A group of `size` queries (its *members*, numbered from 0) is turned into tasks, which run on
    distinct workers. Tasks 0 to size − 1 belong to the members; tasks k to k + r − 1 are parities,
    whatever the size. All methods run under `torch.inference_mode`.
    """

    @property
    def name(self) -> str:
        """The method's name on the command line."""

    @property
    def k(self) -> int:
        """The most data queries in a group."""

    @property
    def r(self) -> int:
        """The number of parity tasks of a group."""

    @property
    def fixed_size(self) -> bool:
        """Whether groups must have exactly k members; otherwise 1 to k are served."""

    @property
    def guesses(self) -> bool:
        """Whether `decode` answers every member once a parity is here, if need be by a guess.

        A guess is worse than the answer of a member that is determined: servers ask last for it.
        """

    @property
    def parameters(self) -> int:
        """The number of weights a worker holds."""

    @property
    def encode_seconds(self) -> float:
        """How long encoding took in the last parity task that this object computed."""

    def tasks(self, size: int) -> Mapping[int, tuple[int, ...]]:
        """Return for each task of a group the members that it needs.

        (0,), (1,), … for data tasks of a systematic code and all members for a parity. A
        non-systematic code needs all members for every task, so nothing leaves before the group is
        full.
        """

    def recoverable(self, available: frozenset[int], size: int) -> frozenset[int]:
        """Return the members of a group of `size` that the outputs of these tasks determine.

        These are the members that `decode` answers from these outputs, unless it guesses; a server
        asks before any output is there, and a simulator has none.
        """

    def compute(self, task: int, queries: Tensor) -> Tensor:
        """Do a task, encoding included: the worker's part.

        Args:
            task: its number.
            queries: (B, members, C, H, W), the members that the task needs, uint8 or 0..1.

        Returns:
            (B, n) float32. A parity's output may carry side features beside the latent.
        """

    def direct(self, output: Tensor) -> Tensor | None:
        """Map a data task's output (B, n) to its own logits (B, classes), without any group.

        None if the code is not systematic. The output of a systematic code's data task does not
        depend on the group.
        """

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Return logits (B, classes) for every member that these outputs determine, or guesses.

        Args:
            outputs: task -> (B, n), of the tasks that answered.
            size: the group's size.
        """

    def residual(self, outputs: Mapping[int, Tensor], size: int) -> Tensor | None:
        """Return how far a complete group is from consistent, (B,), or None if one is missing.

        It is what a corrupt worker shows up in.
        """
