"""What a worker computes a task with, and what it answers: plain arrays, without PyTorch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from codedinvnet.protocol.tensors import DATATYPES, TensorSpec

OUTPUT = ""
"""The name of a scheme's output among a worker's; a model's own outputs have longer ones."""


class Result(NamedTuple):
    """What a worker computed."""

    outputs: Mapping[str, np.ndarray]
    """Name -> (B, ...): a model's own outputs, or a scheme's under OUTPUT."""
    seconds: float
    """The worker's computing time."""
    encode_seconds: float = 0.0
    """The part of `seconds` that went into encoding; 0 for tasks that are not encoded."""
    held: float = 0.0
    """For how many seconds an injected fault keeps the answer back; the worker is free."""


class Computer(Protocol):
    """What a worker computes tasks with."""

    def compute(
        self, number: int, inputs: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], float]:
        """Return a task's outputs, and the seconds that encoding took.

        The inputs are name -> (members, *shape), of the members that the task needs.
        """


def run_task(computer: Computer, number: int, inputs: Mapping[str, np.ndarray]) -> Result:
    """Compute one task, and time it."""
    began = time.perf_counter()
    outputs, encoding = computer.compute(number, inputs)
    return Result(outputs, time.perf_counter() - began, encoding)


def floated(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs as codes take them: all floats as float32."""
    return {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array.copy()
        for name, array in inputs.items()
    }


def copied(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs as backups take them: what `protect` measured them on, and writable."""
    return {name: array.copy() for name, array in inputs.items()}


def zeros(inputs: Sequence[TensorSpec], rows: int = 1) -> dict[str, np.ndarray]:
    """Return a batch of queries of zeros: name -> (rows, *shape)."""
    return {
        spec.name: np.full(
            (rows, *spec.shape), b"" if spec.datatype == "BYTES" else 0, DATATYPES[spec.datatype]
        )
        for spec in inputs
    }
