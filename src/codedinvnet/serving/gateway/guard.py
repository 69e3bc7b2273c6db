"""What makes up for late answers of upstreams: a small backup, or a code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codedinvnet.codes.rules import Rules
from codedinvnet.serving.gateway.understanding import Understanding
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.workers.pool import WorkerPool

if TYPE_CHECKING:  # a gateway without a code does without PyTorch
    from codedinvnet.codes.base import Scheme
    from codedinvnet.serving.workers.computing import ModelComputer


@dataclass(frozen=True)
class Backup:
    """A small backup of the upstreams' model.

    Attributes:
        rules: the groups' tasks.
        understanding: reads what it answers to.
        pool: its workers, not yet started.
        workers: how many there are.
        slots: how many tasks each of them may be at.
    """

    rules: Rules
    understanding: Understanding
    pool: WorkerPool
    workers: int
    slots: int


@dataclass(frozen=True)
class Coded:
    """A code around the upstreams' model.

    Attributes:
        served: the model.
        scheme: the code.
        computer: does its tasks by asking upstreams, while the gateway starts.
    """

    served: OwnModel
    scheme: Scheme
    computer: ModelComputer
