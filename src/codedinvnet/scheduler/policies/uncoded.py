"""`uncoded` does nothing about late answers; what is lost is sent again under every policy."""

from __future__ import annotations

from dataclasses import dataclass

from codedinvnet.scheduler.policies.policy import Policy


@dataclass(frozen=True)
class Uncoded(Policy):
    """Sends each query once."""

    title = "uncoded"


UNCODED = Uncoded()
