"""What a protection's approximate answers may be relied on, from inputs that nothing saw.

Its calibration is one like a bundle's, of the *model's* digest. A backup answers for each query by
itself, so that its answers are alike however many members are missing. A code's guesses rest on the
side features alone, and so do the answers of its row for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codedinvnet.protect.folder import EVIDENCE, read_description
from codedinvnet.protect.measure import Candidate
from codedinvnet.trust.bound import Curve
from codedinvnet.trust.calibration import (
    DECODED,
    FILE,
    GUESSED,
    Calibration,
    Kind,
    load_calibration,
)

AGAIN = "`codedinvnet protect` makes it"


def by_groups(groups: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Return values (N,) as (groups, members); in columns of one if groups differ in size."""
    _, counts = np.unique(groups, return_counts=True)
    size = int(counts[0]) if len(counts) and (counts == counts[0]).all() else 1
    order = np.argsort(groups, kind="stable")
    return [array[order].reshape(-1, size) for array in values]


def save(folder: Path, candidates: Sequence[Candidate], digest: str) -> None:
    """Write the curves of methods for a model of a digest."""
    curves = {}
    for candidate in candidates:
        answers = candidate.calibration
        confidences, agrees = by_groups(answers.groups, answers.confidence, answers.agrees)
        curve = Curve.of(confidences, agrees)
        curves[Kind(candidate.name, candidate.k, DECODED)] = curve
        if agrees.shape[1] == 1:
            curves[Kind(candidate.name, candidate.k, GUESSED)] = curve
        if EVIDENCE.get(candidate.name) == "side":
            guessing = (name for name, evidence in EVIDENCE.items() if evidence != "scores")
            curves |= {Kind(name, candidate.k, GUESSED): curve for name in guessing}
    images = max((len(c.calibration.agrees) for c in candidates), default=0)
    Calibration(digest, images, curves).save(folder / FILE)


def protection_calibration(folder: Path) -> Calibration:
    """Read the calibration of a protection.

    Raises:
        UserError: if there is none, it is damaged, or it is of another model.
    """
    return load_calibration(folder, read_description(folder)["model"]["digest"], AGAIN)


def calibration_if_any(folder: Path, needed: bool) -> Calibration | None:
    """Read the calibration of a protection; None if there is none and none is needed.

    Raises:
        UserError: see `protection_calibration`.
    """
    return protection_calibration(folder) if needed or (folder / FILE).is_file() else None
