"""What makes up for late answers of upstreams: a small backup, or a code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codedinvnet.codes.rules import SMALL_BACKUP, CodeRules
from codedinvnet.serving.gateway.understanding import Understanding
from codedinvnet.serving.gateway.upstreams import Upstream
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.workers.pool import WorkerPool

if TYPE_CHECKING:  # a gateway without a code does without PyTorch
    from codedinvnet.codes.base import Scheme
    from codedinvnet.serving.workers.computing import ModelComputer
    from codedinvnet.trust.calibration import Calibration


@dataclass(frozen=True)
class Backup:
    """A small backup of the upstreams' model.

    Attributes:
        rules: the groups' tasks.
        understanding: reads what it answers to.
        pool: its workers, not yet started.
        workers: how many there are.
        slots: how many tasks each of them may be at.
        method: what the protection calls it.
        calibration: of the protection; None if it has none.
        differs: see `Roster`.
        hang_timeout: seconds that a worker may be at one task; None: its pool finds that out.
    """

    rules: CodeRules
    understanding: Understanding
    pool: WorkerPool
    workers: int
    slots: int
    method: str = SMALL_BACKUP
    calibration: Calibration | None = None
    differs: Callable[[Upstream], Awaitable[str]] | None = None
    hang_timeout: float | None = None


@dataclass(frozen=True)
class Coded:
    """A code around the upstreams' model.

    Attributes:
        served: the model.
        scheme: the code.
        computer: does its tasks by asking upstreams, while the gateway starts.
        calibration: of the protection; None if it has none.
    """

    served: OwnModel
    scheme: Scheme
    computer: ModelComputer
    calibration: Calibration | None = None
