"""Calibrates a bundle's approximate answers, and checks the bound over random splits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import part_beside, scheme_for
from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.data import ImageSource
from codedinvnet.evaluation.comparisons import compare
from codedinvnet.files import file_digest
from codedinvnet.models.bundle import Bundle
from codedinvnet.trust.bound import Curve, oracle_coverage
from codedinvnet.trust.calibration import DECODED, Calibration, Kind, load_calibration

BACKUP = SmallBackup.name
SIZES = (2, 4, 10)
"""Group sizes that are calibrated, besides the largest that a bundle serves and those of its small
backups; groups of another size go by the next larger one."""
SPLITS = 200
"""Random splits of the check."""


def schemes(bundle: Bundle, sizes: Iterable[int]) -> Iterator[tuple[str, int, Scheme]]:
    """Yield the method, group size and scheme of all that a bundle is calibrated for."""
    for k in sizes:
        if k in bundle.info.group_sizes:
            yield OURS, k, scheme_for(bundle, k)
        if part_beside(bundle.folder, find_method(BACKUP), k) is not None:
            yield BACKUP, k, scheme_for(bundle, k, BACKUP)


def calibrate(bundle: Bundle, held_out: ImageSource, seed: int = 0) -> Calibration:
    """Make the curves of a bundle of images that it was not trained on."""
    served, backup = bundle.info.group_sizes, find_method(BACKUP)
    sizes = {k for k in served if part_beside(bundle.folder, backup, k) is not None}
    curves, parts = {}, {}
    for method, k, scheme in schemes(bundle, sorted({*SIZES, max(served), *sizes})):
        compared = compare(scheme, held_out, k=k, seed=seed)
        for answer, (confidences, agrees) in compared.kinds().items():
            curves[Kind(method, k, answer)] = Curve.of(confidences, agrees)
        if (part := part_beside(bundle.folder, find_method(method), k)) is not None:
            parts[part.stem] = file_digest(part)
    return Calibration(bundle.digest(), len(held_out), curves, parts)


def calibration_of(
    folder: Path, weights: str, method: str, k: int, part: Path | None = None
) -> Calibration:
    """Read a bundle's calibration, without curves that another trained part of the method made.

    Args:
        folder: the bundle's.
        weights: the digest of its weights.
        method: the name of the method that is asked about.
        k: the most members of its groups.
        part: the file with the method's trained part; None: the one beside the weights, if any.

    Raises:
        UserError: see `load_calibration`.
    """
    stored, found = load_calibration(folder, weights), find_method(method)
    if not found.part:
        return stored
    part = part or part_beside(folder, found, k)
    return stored.of_part(found.name, k, "" if part is None else file_digest(part))


def trust_rows(
    bundle: Bundle,
    held_out: ImageSource,
    test: ImageSource,
    limits: Iterable[float],
    *,
    k: int,
    seed: int = 0,
    splits: int = SPLITS,
) -> list[dict[str, Any]]:
    """Check the bound for each method and limit.

    Groups of the held-out and the test images are split at random into halves: one calibrates, of
    the other the released answers are counted. What the bundle's own calibration releases is told
    beside it, of its own images and of the test images: its own have chosen the checkpoint, and may
    disagree less often than others.

    Raises:
        UserError: if the bundle has no calibration.
    """
    rows = []
    for method, _, scheme in schemes(bundle, (k,)):
        stored = calibration_of(bundle.folder, bundle.digest(), method, k)
        curve = stored.curve(method, k)
        if curve is None:
            continue
        sets = [compare(scheme, images, k=k, seed=seed).kinds() for images in (held_out, test)]
        parts = [kinds[DECODED] for kinds in sets]
        for limit in limits:
            own = {"bundle": bundle.info.name, "weights": stored.weights, "method": method, "k": k}
            row = split_row(curve, parts[0], parts[1], limit, seed, splits)
            rows.append({**own, "limit": limit, "splits": splits, **row})
    return rows


Answers: TypeAlias = Sequence[np.ndarray]
"""Confidences of approximate answers, and whether they agree, (groups, members) each."""


def split_row(
    curve: Curve, held_out: Answers, test: Answers, limit: float, seed: int, splits: int
) -> dict[str, Any]:
    """Return how often splits of all groups break a limit, and what a curve releases of `test`."""
    confidences, agrees = (np.concatenate(pair) for pair in zip(held_out, test, strict=True))
    tried = list(_splits(confidences, agrees, limit, seed, splits))
    above, coverage, oracle, shares = np.array(tried).T
    threshold = curve.threshold(limit)
    shipped = released(test[0], test[1], threshold)
    return {
        "splits_above_limit": round(float(above.mean()), 4),
        "disagreement": round(float(shares.mean()), 5),
        "coverage": round(float(coverage.mean()), 4),
        "oracle_coverage": round(float(oracle.mean()), 4),
        "stored_threshold": None if math.isinf(threshold) else threshold,
        "stored_disagreement": round(curve.coverage(limit).disagreement, 5),
        "test_disagreement": round(shipped[0], 5),
        "test_coverage": round(shipped[1], 4),
    }


def reliability_rows(
    bundle: Bundle, test: ImageSource, *, k: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare the stored probabilities of agreement with how often answers to test images agree.

    The calibration error is the mean of |probability − agreement| over the answers, where those of
    one probability count together. The Brier score of a constant is that of the mean agreement.

    Raises:
        UserError: if the bundle has no calibration.
    """
    rows = []
    for method, _, scheme in schemes(bundle, (k,)):
        stored = calibration_of(bundle.folder, bundle.digest(), method, k)
        for answer, answers in compare(scheme, test, k=k, seed=seed).kinds().items():
            curve = stored.curve(method, k, answer)
            if curve is not None:
                own = {"bundle": bundle.info.name, "method": method, "k": k, "answer": answer}
                rows.append({**own, **reliability(curve, *answers)})
    return rows


def reliability(curve: Curve, confidences: np.ndarray, agrees: np.ndarray) -> dict[str, Any]:
    """Return how a curve's probabilities compare with what answers show."""
    told, agreed = curve.probability(confidences).ravel(), agrees.ravel()
    steps, places, counts = np.unique(told, return_inverse=True, return_counts=True)
    seen = np.bincount(places, agreed) / counts
    mean = float(agreed.mean())
    return {
        "answers": told.size,
        "agreement": round(mean, 5),
        "mean_probability": round(float(told.mean()), 5),
        "calibration_error": round(float((np.abs(steps - seen) * counts).sum() / told.size), 5),
        "brier": round(float(np.square(told - agreed).mean()), 5),
        "brier_of_a_constant": round(mean * (1 - mean), 5),
        "steps": [
            [round(float(step), 4), round(float(share), 4), int(count)]
            for step, share, count in zip(steps, seen, counts, strict=True)
        ],
    }


def _splits(
    confidences: np.ndarray, agrees: np.ndarray, limit: float, seed: int, splits: int
) -> Iterator[tuple[bool, float, float, float]]:
    """Yield for each split if it is above the limit, its coverage, an oracle's, and its share."""
    random = np.random.default_rng(seed)
    half = len(agrees) // 2
    for _ in range(splits):
        order = random.permutation(len(agrees))
        known, later = order[:half], order[half:]
        curve = Curve.of(confidences[known], agrees[known])
        threshold = curve.threshold(limit, horizon=agrees[later].size)
        share, coverage = released(confidences[later], agrees[later], threshold)
        yield (
            share > limit,
            coverage,
            oracle_coverage(confidences[later], agrees[later], limit),
            share,
        )


def released(confidences: np.ndarray, agrees: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return the share of released answers that disagree, and the share that is released."""
    chosen = confidences >= threshold
    share = float((~agrees)[chosen].mean()) if chosen.any() else 0.0
    return share, float(chosen.mean())
