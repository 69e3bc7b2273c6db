"""`python -m benchmarks trust`: over random splits, do released answers keep a limit?

Groups of the held-out and the test images are split at random into halves: one calibrates, and of
the other the released answers are counted. So is what the bundle's own calibration releases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from codedinvnet.common.errors import UserError
from codedinvnet.common.provenance import describe_commit, describe_machine
from codedinvnet.evaluation.stages import evaluation_images
from codedinvnet.evaluation.trust import approximate, by_group, schemes
from codedinvnet.models.bundle import load_bundle
from codedinvnet.protect.bound import Curve
from codedinvnet.protect.calibration import DECODED, calibration_of
from codedinvnet.protect.measure import coverage_at

K = 10
LIMITS = (0.005, 0.01, 0.02)
Answers: TypeAlias = Sequence[np.ndarray]
"""Confidences of approximate answers, and whether they agree, (groups, members) each."""


def run(bundles: Sequence[str], data_dir: Path | None, *, runs: int, seed: int) -> dict[str, Any]:
    """Return the rows of the check, one for each limit.

    Raises:
        UserError: if a bundle has no calibration.
    """
    rows = []
    for name in bundles:
        bundle = load_bundle(name)
        held_out, test = (evaluation_images(bundle, s, data_dir) for s in ("validation", "test"))
        for method, k, scheme in schemes(bundle, (K,)):
            stored = calibration_of(bundle.folder, bundle.digest(), method, k)
            curve = stored.curve(method, k, DECODED)
            if curve is None:
                raise UserError(f"{name} is not calibrated: `codedinvnet calibrate` does that")
            known, later = (
                by_group(approximate(scheme, source, k, seed=seed)[DECODED], k)
                for source in (held_out, test)
            )
            for limit in LIMITS:
                own = {"bundle": name, "weights": stored.weights, "method": method, "k": k}
                row = split_row(curve, known, later, limit, seed, runs)
                rows.append({**own, "limit": limit, "splits": runs, **row})
    return {
        "command": "python -m benchmarks trust --data-dir data --json",
        "rows": rows,
        "commit": describe_commit(),
        "machine": describe_machine(),
    }


def split_row(
    curve: Curve, held_out: Answers, test: Answers, limit: float, seed: int, splits: int
) -> dict[str, Any]:
    """Return how often splits of all groups break a limit, and what a curve releases of `test`."""
    confidences, agrees = (np.concatenate(pair) for pair in zip(held_out, test, strict=True))
    tried = list(_splits(confidences, agrees, limit, seed, splits))
    above, coverage, oracle, shares = np.array(tried).T
    threshold = curve.threshold(limit)
    shipped = released(test[0], test[1], threshold)
    last = max(0, int((curve.thresholds >= threshold).sum()) - 1)
    return {
        "splits_above_limit": round(float(above.mean()), 4),
        "disagreement": round(float(shares.mean()), 5),
        "coverage": round(float(coverage.mean()), 4),
        "oracle_coverage": round(float(oracle.mean()), 4),
        "stored_threshold": None if math.isinf(threshold) else threshold,
        "stored_disagreement": round(float((curve.disagreed / curve.released)[last]), 5),
        "test_disagreement": round(shipped[0], 5),
        "test_coverage": round(shipped[1], 4),
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
        oracle = coverage_at(confidences[later].ravel(), agrees[later].ravel(), 1 - limit)
        yield share > limit, coverage, oracle, share


def released(confidences: np.ndarray, agrees: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return the share of released answers that disagree, and the share that is released."""
    chosen = confidences >= threshold
    share = float((~agrees)[chosen].mean()) if chosen.any() else 0.0
    return share, float(chosen.mean())
