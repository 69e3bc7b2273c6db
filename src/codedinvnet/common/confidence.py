"""How certain an approximate answer is: one figure, for calibrations and for what is served."""

from __future__ import annotations

import numpy as np

LEAST = 1e-7
"""Smaller probabilities count as this one."""


def log_probabilities(scores: np.ndarray, kind: str) -> np.ndarray:
    """Return the log-probabilities, float32 (N, classes), that "logits" or "probabilities" mean.

    Decoded probabilities may be negative or above 1, so they are clipped at `LEAST`, and each row
    is scaled to the sum 1. The logarithms of a row that is not finite aren't finite either.
    """
    scores = scores.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "probabilities":
            scores = np.log(np.maximum(scores, np.float32(LEAST)))
        scores = scores - scores.max(axis=1, keepdims=True)
        found: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return found


def confidences(scores: np.ndarray, kind: str) -> np.ndarray:
    """Return the largest probability of each row, float32 (N,)."""
    found: np.ndarray = np.exp(log_probabilities(scores, kind).max(axis=1))
    return found
