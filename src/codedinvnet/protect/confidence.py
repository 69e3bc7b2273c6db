"""How sure an approximate answer is: one figure, for calibrations and for what is served."""

from __future__ import annotations

import numpy as np

LEAST = 1e-7
"""The probability below which none is told from another."""


def log_probabilities(scores: np.ndarray, kind: str) -> np.ndarray:
    """Return the logarithms of probabilities, float32 (N, classes), that scores stand for.

    Decoded probabilities may be negative, or above 1: they are cut off at `LEAST`, and each row is
    scaled to the sum 1. A row that is not finite has logarithms that are not finite.

    Args:
        scores: (N, classes).
        kind: "logits" or "probabilities".
    """
    scores = scores.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "probabilities":
            scores = np.log(np.maximum(scores, np.float32(LEAST)))
        scores = scores - scores.max(axis=1, keepdims=True)
        found: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return found


def confidences(scores: np.ndarray, kind: str) -> np.ndarray:
    """Return the largest probability of each row of scores, float32 (N,) in 0..1.

    Args:
        scores: (N, classes).
        kind: "logits" or "probabilities".
    """
    found: np.ndarray = np.exp(log_probabilities(scores, kind).max(axis=1))
    return found
