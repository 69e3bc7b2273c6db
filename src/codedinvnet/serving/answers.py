"""How queries and requests end: with an answer, or with one of these errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Answered(NamedTuple):
    """One query's answer."""

    outputs: Mapping[str, np.ndarray]
    """Name -> (1, *shape)."""
    outcome: str
    """`direct`, `decoded`, or `guessed` (decoded from less than determines it)."""
    seconds: float
    """The time from the query's arrival until its answer."""
    work_seconds: float = 0.0
    """The part of `seconds` until all was here that the answer is made of: queues and workers. The
    rest is the front end's: decoding."""
    agreement: float | None = None
    """The calibrated probability that an approximate answer agrees with the served model; None of a
    direct answer, and without a calibration."""


class QueryFailed(Exception):
    """A query ended without an answer; the message says why."""


class InputRefused(QueryFailed):
    """The model fails on the input, whichever worker computes it."""


class Cancelled(QueryFailed):
    """Its client is gone."""

    def __init__(self) -> None:
        super().__init__("cancelled")


class DeadlinePassed(QueryFailed):
    """Its time was over; `failure` is why a worker had no answer, `where` which ones had it."""

    def __init__(self, message: str, failure: str = "", where: str = "") -> None:
        last = failure and f"last failure: {failure}"
        super().__init__("; ".join(filter(None, (message, where, last))))
        self.failure, self.where = failure, where


class NotNow(Exception):
    """Queries are not taken now, but may be after so many seconds."""

    def __init__(self, why: str, seconds: int = 1) -> None:
        super().__init__(why)
        self.seconds = seconds
